// Many tensors into one flat buffer, and back: one kernel on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace fastddp {

// Whether the extension brings kernels of its own for GPUs.
#ifdef FASTDDP_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

// A real tensor whose elements fill its memory without gaps, and where they go, in memory's order.
struct FlatPiece {
  at::Tensor tensor;  // undefined: zeros
  std::int64_t offset;
  std::int64_t numel;
};

// flat = pieces * scale, on the current stream. The pieces are all of `dtype`, which goes to that
// of `flat`: see converts(). `moments` gets {sum of squares, 1 if all is finite else 0}, as
// float64; it may be undefined, and has to be where neither the CPU nor kHasCuda serves.
void flatten(const at::Tensor& flat,
             const std::vector<FlatPiece>& pieces,
             at::ScalarType dtype,
             double scale,
             const at::Tensor& moments = {});

// pieces = flat * scale
void unflatten(const at::Tensor& flat,
               const std::vector<FlatPiece>& pieces,
               at::ScalarType dtype,
               double scale);

}  // namespace fastddp
