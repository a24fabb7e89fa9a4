// How the pieces of a pass are spread over kernel launches. A pure function of the pieces and two
// dtypes; it dereferences nothing, so tests/cpp/flatten_launches_test.cpp covers sizes that no
// machine has memory for.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "kernels/fused_flatten.h"

namespace fastddp {

// One block of threads moves one chunk: this many bytes of what it reads.
inline constexpr std::uint32_t kChunkBytes = 16384;

constexpr std::uint32_t chunk_numel(DType source) {
  return kChunkBytes / static_cast<std::uint32_t>(size_of(source));
}

// A piece, or a part of a huge one, as a kernel sees it. Blocks [first_block, that of the next
// span) share its chunks.
struct PieceSpan {
  void* data;           // null: zeros
  std::int64_t offset;  // in the flat buffer's elements
  std::uint32_t numel;  // not 0
  std::uint32_t first_block;
};

// A multiple of every chunk, so that only the last part of a huge piece ends in a short chunk.
inline constexpr std::int64_t kMaxSpanNumel = std::int64_t{1} << 31;

// Spans ride as a kernel argument. 4 KB is what every launch can carry for nothing; a launch may
// carry 32,764 bytes since CUDA 12.1 (on 7.0 and later), but then its whole table is copied into
// the launch. So there are two sizes of table. A kernel's other arguments need the rest.
inline constexpr std::uint32_t kSmallTable = 168;
inline constexpr std::uint32_t kLargeTable = 1360;

struct FlattenLaunch {
  std::vector<PieceSpan> spans;  // 1 to kLargeTable
  std::uint32_t num_blocks;
};

// A grid may have 2^31 - 1 blocks: a table is full before.
static_assert(kLargeTable * (kMaxSpanNumel / chunk_numel(DType::kFloat64)) < 1LL << 31);

// Throw std::invalid_argument for a piece of negative size, and a piece to be written that is null.
std::vector<FlattenLaunch> flatten_launches(const FlatPass& pass, const std::vector<Piece>& pieces);
std::vector<FlattenLaunch> unflatten_launches(const FlatPass& pass,
                                              const std::vector<Piece>& pieces);

}  // namespace fastddp
