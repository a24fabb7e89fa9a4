// Copies many tensors into one flat buffer, and back, with one kernel on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace fastddp {

// Whether the extension was built with kernels for GPUs.
#ifdef FASTDDP_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

// A real tensor without gaps in its memory, and the place of its elements in the flat buffer, in
// the order of memory.
struct FlatPiece {
  at::Tensor tensor;  // undefined: zeros
  std::int64_t offset;
  std::int64_t numel;
};

// flat = pieces * scale, on the current stream. All pieces are of `dtype`, which has to convert to
// the dtype of `flat` (converts()). `moments` is undefined, or two float64 elements, which get the
// sum of squares and 1 if all values are finite, else 0. It has to be undefined on a device that is
// neither the CPU nor a GPU with kHasCuda.
void flatten(const at::Tensor& flat,
             const std::vector<FlatPiece>& pieces,
             at::ScalarType dtype,
             double scale,
             const at::Tensor& moments = {});

// pieces = flat * scale, on the current stream, for the same dtypes.
void unflatten(const at::Tensor& flat,
               const std::vector<FlatPiece>& pieces,
               at::ScalarType dtype,
               double scale);

}  // namespace fastddp
