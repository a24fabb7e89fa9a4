// The pass that moves one gradient into its bucket on the CPU: it copies or adds, scales by 1 /
// world size, and casts to the dtype of the bucket.
//
// The arithmetic is that of torch's `mul` and `add` on the CPU: the scale is rounded to float
// (double for float64), each operation rounds once, 16-bit types are computed in float. Built with
// -ffp-contract=off: one fused multiply-add would break bit equality with the Python engine.
#pragma once

#include <cstddef>

#include "core/dtype.h"

namespace fastddp {

// dst[i] = src[i] * scale. The two may be the same memory, but must not overlap in part.
// Both functions throw std::invalid_argument unless converts(from, to).
void scale_copy(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale);

// dst[i] = dst[i] + (src[i] * scale). The product is rounded first: to the dtype if both have the
// same, else to float.
void scale_add(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale);

// The loops of the two for one pair of dtypes, for whoever knows the pair long before the memory.
// Throw std::invalid_argument unless converts(from, to).
using ScaleLoop = void (*)(void* dst, const void* src, std::size_t numel, double scale);
ScaleLoop copy_loop(DType to, DType from);
ScaleLoop add_loop(DType to, DType from);

}  // namespace fastddp
