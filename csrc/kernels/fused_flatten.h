// One pass between any number of tensors and the flat buffer of their bucket: copy, cast and scale.
//
// Each element is widened to float, multiplied by the scale rounded to float, and rounded once to
// the dtype it goes to; float64 only goes to float64, and is computed in double. The same bits come
// out on the CPU and on a GPU, but for a NaN's: both run the functions of fused_flatten_body.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fastddp {

// A tensor whose elements lie one after the other, and its place in the flat buffer. Places do not
// overlap. A piece may lie in its own place, but may not overlap it in part.
struct Piece {
  void* data;           // null: flatten writes zeros
  std::int64_t offset;  // in the flat buffer's elements
  std::int64_t numel;
};

struct FlatPass {
  DType piece;  // of every piece
  DType flat;
  double scale;
};

// What a flatten can tell about the values it wrote, as they are after rounding. Squares are
// computed in float (double for float64), so one can be infinite though its value is finite. The
// additions are in an order that depends on sizes and on alignment to 16 bytes alone.
struct Moments {
  double sum_of_squares;
  double finite;  // 1 if every value is, else 0
};

// Throws std::invalid_argument for a pair of dtypes that there is no conversion for.
void fused_flatten(const FlatPass& pass,
                   const std::vector<Piece>& pieces,
                   void* flat,
                   Moments* moments = nullptr);
// piece[i] = flat[offset + i] * scale. Throws std::invalid_argument for a null piece.
void fused_unflatten(const FlatPass& pass, const std::vector<Piece>& pieces, const void* flat);

// The same on a GPU: only enqueued on `stream`, a cudaStream_t, of the current device. Tables
// travel as kernel arguments, so that a CUDA graph can capture it. Throws std::runtime_error with
// CUDA's text if a launch fails.
namespace cuda {

// Floats of device memory that a flatten with moments needs.
std::size_t moments_scratch(const std::vector<Piece>& pieces);
void fused_flatten(const FlatPass& pass,
                   const std::vector<Piece>& pieces,
                   void* flat,
                   void* stream,
                   Moments* moments = nullptr,  // in device memory, like `scratch`
                   float* scratch = nullptr);
void fused_unflatten(const FlatPass& pass,
                     const std::vector<Piece>& pieces,
                     const void* flat,
                     void* stream);

}  // namespace cuda
}  // namespace fastddp
