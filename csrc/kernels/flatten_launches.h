// How the pieces of a pass are spread over kernel launches. A pure function of the pieces and two
// dtypes that reads no memory of a piece, so tests/cpp/flatten_launches_test.cpp covers sizes that
// no machine has memory for.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "kernels/fused_flatten.h"

namespace fastddp {

// The size of a chunk, which one block of threads moves, in bytes that it reads.
inline constexpr std::uint32_t kChunkBytes = 16384;

constexpr std::uint32_t chunk_numel(DType source) {
  return kChunkBytes / static_cast<std::uint32_t>(size_of(source));
}

// A piece, or a part of a huge one, as a kernel sees it. The blocks from `first_block` up to that
// of the next span move one chunk of it each.
struct PieceSpan {
  void* data;           // null: zeros
  std::int64_t offset;  // in the flat buffer's elements
  std::uint32_t numel;  // not 0
  std::uint32_t first_block;
};

// The most elements of a span: a multiple of every chunk size, so that only the last part of a huge
// piece ends in a short chunk.
inline constexpr std::int64_t kMaxSpanNumel = std::int64_t{1} << 31;

// How many spans a launch can carry in its arguments. Every launch carries 4 KB at no extra cost.
// It may carry 32,764 bytes since CUDA 12.1 (compute capability 7.0 and later), but then the whole
// table is copied into the launch. So there are two sizes of table. The kernel's other arguments
// need the rest of the bytes.
inline constexpr std::uint32_t kSmallTable = 168;
inline constexpr std::uint32_t kLargeTable = 1360;

struct FlattenLaunch {
  std::vector<PieceSpan> spans;  // 1 to kLargeTable
  std::uint32_t num_blocks;
};

// A grid may have 2^31 - 1 blocks. A full table needs fewer.
static_assert(kLargeTable * (kMaxSpanNumel / chunk_numel(DType::kFloat64)) < 1LL << 31);

// Both throw std::invalid_argument for a piece of negative size, and unflatten_launches() also for
// a null piece.
std::vector<FlattenLaunch> flatten_launches(const FlatPass& pass, const std::vector<Piece>& pieces);
std::vector<FlattenLaunch> unflatten_launches(const FlatPass& pass,
                                              const std::vector<Piece>& pieces);

}  // namespace fastddp
