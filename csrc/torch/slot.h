// A gradient's way into its slot of a bucket: any layout, any number of threads, the same bits.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/plan.h"
#include "kernels/flatten.h"

namespace fastddp {

// Above this many elements torch's own kernel is used where it may run on several threads; the bits
// are the same.
inline constexpr std::int64_t kParallelNumel = 1 << 15;

inline at::Tensor as_real(const at::Tensor& tensor) {
  return tensor.is_complex() ? at::view_as_real(tensor) : tensor;
}

inline std::size_t real_numel(const at::Tensor& tensor) {
  return static_cast<std::size_t>(tensor.numel()) * (tensor.is_complex() ? 2 : 1);
}

// The gradient with its values in memory: a lazy conjugation or negation is only a bit on the
// tensor.
inline at::Tensor resolved(const at::Tensor& grad) {
  return grad.is_conj() || grad.is_neg() ? grad.resolve_conj().resolve_neg() : grad;
}

// Whether the two hold their elements in the same places, so that one flat loop runs over both.
inline bool runs_flat(const at::Tensor& slot, const at::Tensor& grad) {
  return slot.is_cpu() && grad.is_cpu() && slot.scalar_type() == grad.scalar_type() &&
         slot.sizes() == grad.sizes() && slot.strides() == grad.strides() &&
         slot.is_non_overlapping_and_dense() &&
         (grad.numel() < kParallelNumel || at::get_num_threads() == 1);
}

// slot = grad * scale
inline void write(DType dtype, const at::Tensor& slot, const at::Tensor& lazy_grad, double scale) {
  const at::Tensor grad = resolved(lazy_grad);
  if (runs_flat(slot, grad)) {
    scale_copy(dtype, slot.data_ptr(), grad.const_data_ptr(), real_numel(grad), scale);
  } else {
    auto out = as_real(slot);
    at::mul_out(out, as_real(grad), at::native::wrapped_scalar_tensor(scale));
  }
}

// slot += grad * scale
inline void add(DType dtype, const at::Tensor& slot, const at::Tensor& lazy_grad, double scale) {
  const at::Tensor grad = resolved(lazy_grad);
  if (runs_flat(slot, grad)) {
    scale_add(dtype, slot.data_ptr(), grad.const_data_ptr(), real_numel(grad), scale);
  } else {
    as_real(slot).add_(as_real(grad).mul(scale));
  }
}

// The part of `flat` that is `variable`'s gradient, shaped like it, and strided like it unless
// `contiguous`. Shares the bucket's storage but is not a view to autograd, so `grad.detach_()` and
// the like work on it.
inline at::Tensor make_slot(const at::Tensor& variable,
                            const at::Tensor& flat,
                            const SlotPlan& slot,
                            bool contiguous) {
  const auto sizes = variable.sizes();
  const auto row_major = at::detail::defaultStrides(sizes);
  const auto strides = variable.is_non_overlapping_and_dense() && !contiguous
                           ? variable.strides()
                           : at::IntArrayRef(row_major);
  const std::int64_t offset = variable.is_complex() ? slot.offset / 2 : slot.offset;
  at::Tensor result = at::empty({0}, variable.options().requires_grad(false));
  at::AutoDispatchBelowADInplaceOrView guard;
  result.set_(flat.storage(), offset, sizes, strides);
  return result;
}

}  // namespace fastddp
