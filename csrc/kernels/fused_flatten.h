// One pass that copies, casts and scales between any number of tensors and one flat buffer.
//
// Each element is widened to float, multiplied by the scale rounded to float, and rounded once to
// the dtype it goes to; float64 only goes to float64, and is computed in double. The results
// on the CPU and on a GPU have the same bits, except those of NaNs: both run the functions of
// fused_flatten_body.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fastddp {

// A tensor without gaps between its elements, and its place in the flat buffer. Places must not
// overlap. A piece may be its own place, but must not overlap it in part.
struct Piece {
  void* data;           // null: flatten writes zeros
  std::int64_t offset;  // in the flat buffer's elements
  std::int64_t numel;
};

struct FlatPass {
  DType piece;  // the dtype of every piece
  DType flat;
  double scale;
};

// What a flatten can compute about the values that it wrote, after their rounding. Squares are
// computed in float (double for float64), so the square of a finite value can be infinite. The
// order of the additions depends only on sizes and on alignment to 16 bytes.
struct Moments {
  double sum_of_squares;
  double finite;  // 1 if every value is, else 0
};

// flat[offset + i] = piece[i] * scale. Throws std::invalid_argument for a pair of dtypes that has
// no conversion.
void fused_flatten(const FlatPass& pass,
                   const std::vector<Piece>& pieces,
                   void* flat,
                   Moments* moments = nullptr);
// piece[i] = flat[offset + i] * scale. Throws std::invalid_argument for a null piece.
void fused_unflatten(const FlatPass& pass, const std::vector<Piece>& pieces, const void* flat);

// The same on a GPU. The passes are only enqueued on `stream`, a cudaStream_t of the current
// device. Tables travel as kernel arguments, so a CUDA graph can capture a pass. Throws
// std::runtime_error with CUDA's text if a launch fails.
namespace cuda {

// Returns how many floats of device memory a flatten with moments needs as scratch.
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
