// How a gradient gets into its slot of a bucket, with the same bits for any layout and any number
// of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cstddef>
#include <cstdint>

#include "core/plan.h"
#include "kernels/scale.h"
#include "tensor/dtype.h"
#include "tensor/layout.h"

namespace fastddp {

// From this many elements on, torch's own kernel is used where it may run on several threads. The
// bits are the same.
inline constexpr std::int64_t kParallelNumel = 1 << 15;

inline at::Tensor as_real(const at::Tensor& tensor) {
  return tensor.is_complex() ? at::view_as_real(tensor) : tensor;
}

inline std::size_t real_numel(const at::Tensor& tensor) {
  return static_cast<std::size_t>(tensor.numel()) * (tensor.is_complex() ? 2 : 1);
}

// Returns the gradient with its values in memory: a lazy conjugation or negation is only a bit on
// the tensor, which a flat loop would miss.
inline at::Tensor resolved(const at::Tensor& grad) {
  return grad.is_conj() || grad.is_neg() ? grad.resolve_conj().resolve_neg() : grad;
}

// Whether both tensors hold their elements in the same order, so that one flat loop runs over both.
// Autograd gives a gradient the parameter's strides, except in dimensions of size 1, where strides
// mean nothing.
inline bool lies_like(const at::Tensor& place, const at::Tensor& grad) {
  if (place.sizes() != grad.sizes() || !place.is_non_overlapping_and_dense()) return false;
  for (std::int64_t dim = 0; dim < place.dim(); ++dim) {
    if (place.size(dim) != 1 && place.stride(dim) != grad.stride(dim)) return false;
  }
  return true;
}

inline bool runs_flat(const at::Tensor& place, const at::Tensor& grad) {
  const auto to = dtype_of(place.scalar_type()), from = dtype_of(grad.scalar_type());
  return place.is_cpu() && grad.is_cpu() && to && from && converts(*from, *to) &&
         lies_like(place, grad) && (grad.numel() < kParallelNumel || at::get_num_threads() == 1);
}

// Returns the gradient in the dtype in which it is scaled: float if a 16-bit gradient changes its
// dtype, else its own.
inline at::Tensor widened(const at::Tensor& grad, const at::Tensor& place) {
  const bool is_cast = grad.scalar_type() != place.scalar_type();
  return is_cast && grad.element_size() < 4 ? grad.to(at::kFloat) : grad;
}

// place = grad * scale, where `place` is real.
inline void write(const at::Tensor& place, const at::Tensor& lazy_grad, double scale) {
  const at::Tensor grad = as_real(resolved(lazy_grad));
  if (runs_flat(place, grad)) {
    scale_copy(*dtype_of(place.scalar_type()), place.data_ptr(), *dtype_of(grad.scalar_type()),
               grad.const_data_ptr(), static_cast<std::size_t>(grad.numel()), scale);
  } else {
    at::Tensor out = place;
    at::mul_out(out, widened(grad, place), at::native::wrapped_scalar_tensor(scale));
  }
}

// place += grad * scale, where `place` is real.
inline void add(const at::Tensor& place, const at::Tensor& lazy_grad, double scale) {
  const at::Tensor grad = as_real(resolved(lazy_grad));
  if (runs_flat(place, grad)) {
    scale_add(*dtype_of(place.scalar_type()), place.data_ptr(), *dtype_of(grad.scalar_type()),
              grad.const_data_ptr(), static_cast<std::size_t>(grad.numel()), scale);
  } else {
    place.add_(widened(grad, place).mul(scale));
  }
}

// Returns the part of `flat` that is the gradient of a parameter with layout `like`: in the same
// shape, and with the same strides unless `contiguous`. `like` is what the ranks have compared; the
// parameter may have other strides by now, on this rank alone. The result shares the bucket's
// storage but is not a view to autograd, so `grad.detach_()` and the like work on it.
inline at::Tensor make_slot(const at::Tensor& flat,
                            const SlotPlan& slot,
                            const Layout& like,
                            bool contiguous) {
  const auto row_major = at::detail::defaultStrides(like.sizes);
  const auto strides =
      like.is_dense && !contiguous ? at::IntArrayRef(like.strides) : at::IntArrayRef(row_major);
  const bool is_complex = c10::isComplexType(c10::typeMetaToScalarType(like.options.dtype()));
  at::Tensor result = at::empty({0}, like.options);
  at::AutoDispatchBelowADInplaceOrView guard;
  result.set_(flat.storage(), is_complex ? slot.offset / 2 : slot.offset, like.sizes, strides);
  return result;
}

// Returns how many tensors and other objects refer to a tensor's memory.
inline std::size_t num_references(const at::Tensor& tensor) {
  const auto count_one = [](const auto& slot) -> std::size_t {
    // Torch keeps a Python object for the memory, which counts although nobody may refer to it.
    if constexpr (requires { slot.has_unique_reference(); }) {
      return slot.has_unique_reference() ? 1 : 0;
    } else {
      return 0;
    }
  };
  const c10::Storage& storage = tensor.storage();
  return storage.use_count() - count_one(*storage.unsafeGetStorageImpl()->pyobj_slot());
}

// Whether a gradient begins where the slot does, in the same memory.
inline bool is_alias(const at::Tensor& grad, const at::Tensor& slot) {
  if (!grad.defined() || grad.layout() != at::kStrided || !grad.is_alias_of(slot)) return false;
  return slot.numel() == 0 || grad.const_data_ptr() == slot.const_data_ptr();
}

// Whether the script has left the alias of a slot unchanged.
inline bool is_as_handed_out(const at::Tensor& grad, const at::Tensor& slot) {
  return is_alias(grad, slot) && grad.sizes() == slot.sizes() && grad.strides() == slot.strides() &&
         grad.scalar_type() == slot.scalar_type() && !grad.requires_grad() && !grad.is_conj() &&
         !grad.is_neg();
}

// Asks the processor to load a tensor's description into the cache.
inline void prefetch(const at::Tensor& tensor) {
  const auto* begin = reinterpret_cast<const char*>(tensor.unsafeGetTensorImpl());
  for (std::size_t offset = 0; offset < sizeof(at::TensorImpl); offset += 64)
    __builtin_prefetch(begin + offset);
}

// Returns the same part of another flat buffer, which may have another real dtype, with the shape
// and strides of `slot`, which has to be real.
inline at::Tensor make_place(const at::Tensor& slot, const at::Tensor& wire, const SlotPlan& plan) {
  return wire.as_strided(slot.sizes(), slot.strides(), plan.offset);
}

}  // namespace fastddp
