#include "reducer/places.h"

#include <utility>

#include "tensor/slot.h"

namespace fastddp {

Place::Place(const at::Tensor& flat,
             const at::Tensor& wire,
             const SlotPlan& plan,
             const Layout& like,
             bool contiguous,
             at::Tensor flag_)
    : slot(make_slot(flat, plan, like, contiguous)),
      sent(make_place(as_real(slot), wire, plan)),
      flag(std::move(flag_)),
      dtype_(c10::toRealValueType(c10::typeMetaToScalarType(like.options.dtype()))) {
  const auto to = dtype_of(sent.scalar_type()), from = dtype_of(dtype_);
  if (!sent.is_cpu() || !to || !from || !converts(*from, *to)) return;
  copy_ = copy_loop(*to, *from);
  add_ = add_loop(*to, *from);
}

bool Place::is_served(const at::Tensor& grad) const {
  return copy_ != nullptr && grad.scalar_type() == dtype_ && grad.is_cpu() &&
         lies_like(sent, grad) && (grad.numel() < kParallelNumel || at::get_num_threads() == 1);
}

void Place::write(const at::Tensor& lazy_grad, double scale) const {
  const at::Tensor grad = as_real(resolved(lazy_grad));
  if (is_served(grad)) {
    copy_(sent.data_ptr(), grad.const_data_ptr(), static_cast<std::size_t>(grad.numel()), scale);
  } else {
    fastddp::write(sent, grad, scale);
  }
}

void Place::add(const at::Tensor& lazy_grad, double scale) const {
  const at::Tensor grad = as_real(resolved(lazy_grad));
  if (is_served(grad)) {
    add_(sent.data_ptr(), grad.const_data_ptr(), static_cast<std::size_t>(grad.numel()), scale);
  } else {
    fastddp::add(sent, grad, scale);
  }
}

void Place::clear() const { sent.zero_(); }

}  // namespace fastddp
