// What one thread of one block does in a pass between pieces and the flat buffer. fused_flatten.cu
// runs these functions on a GPU, fused_flatten_cpu.cpp in loops over blocks and threads, so the
// same operations happen in the same order on both.
//
// The aim is the bandwidth of the memory. A thread has 64 bytes of loads in flight, all of them
// before its first store: on an H100, which by Little's law needs some 10 to 20 KB of reads in
// flight per multiprocessor, a quarter of the threads that fit would do. A block moves one chunk of
// 16 KB and ends; blocks that small spread 8 MB evenly over all multiprocessors, and their search
// for a span is hidden by the loads of the others.
#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/flatten_launches.h"

namespace fastddp {

inline constexpr std::uint32_t kBlockThreads = 256;
inline constexpr std::uint32_t kAccessBytes = 16;

template <typename T, std::uint32_t kNumel>
struct alignas(sizeof(T) * kNumel < kAccessBytes ? sizeof(T) * kNumel : kAccessBytes) Pack {
  T values[kNumel];
};

// How many elements a thread reads and writes at once. Stores have 16 bytes, so that the stores of
// a warp fill whole sectors one after the other: a cache merges the two halves of a sector that
// were loaded separately, but each store goes to L2 by itself. So a load has 16 bytes, or 32 in a
// narrowing pass and 8 in a widening one.
template <typename Dst>
inline constexpr std::uint32_t kPackNumel = kAccessBytes / sizeof(Dst);

template <typename Src, typename Dst>
struct Chunk {
  const Src* source;
  Dst* target;
  std::uint32_t numel;
  bool zeros;  // write zeros; `source` is then some address and not read
};

// Returns the chunk of `block`. `to_flat` is the direction of the pass.
template <typename Src, typename Dst>
FASTDDP_HOST_DEVICE Chunk<Src, Dst> find_chunk(const PieceSpan* spans,
                                               std::uint32_t num_spans,
                                               std::uint32_t block,
                                               void* flat,
                                               bool to_flat) {
  std::uint32_t low = 0;
  std::uint32_t high = num_spans;
  while (high - low > 1) {  // spans[low].first_block <= block < spans[high].first_block
    const std::uint32_t middle = (low + high) / 2;
    if (spans[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const PieceSpan& span = spans[low];
  constexpr std::uint32_t kChunk = kChunkBytes / sizeof(Src);
  const std::uint32_t begin = (block - span.first_block) * kChunk;
  const std::uint32_t left = span.numel - begin;
  const std::uint32_t numel = left < kChunk ? left : kChunk;
  const std::int64_t place = span.offset + begin;
  const bool zeros = span.data == nullptr;
  void* piece = zeros ? flat : span.data;
  if (to_flat)
    return {static_cast<const Src*>(piece) + begin, static_cast<Dst*>(flat) + place, numel, zeros};
  return {static_cast<const Src*>(flat) + place, static_cast<Dst*>(piece) + begin, numel, zeros};
}

// A thread's share of the moments.
template <typename Compute>
struct Share {
  Compute sum_of_squares = 0;
  bool finite = true;

  FASTDDP_HOST_DEVICE void add(Compute value) {
    sum_of_squares += value * value;
    finite = finite && value - value == 0;
  }
};

// Moves kLoads packs, first, first + kBlockThreads and so on, as far as they are below num_packs.
// Source and target may be the same memory, so there is no __restrict__ here and nothing goes
// through a read-only cache.
template <bool kMoments, std::uint32_t kNumel, std::uint32_t kLoads, typename Src, typename Dst>
FASTDDP_HOST_DEVICE void move_packs(const Src* source,
                                    Dst* target,
                                    std::uint32_t num_packs,
                                    std::uint32_t first,
                                    bool zeros,
                                    ComputeOf<Src> scale,
                                    Share<ComputeOf<Dst>>& share) {
  using In = Pack<Src, kNumel>;
  using Out = Pack<Dst, kNumel>;
  In in[kLoads] = {};
  FASTDDP_UNROLL
  for (std::uint32_t load = 0; load < kLoads; ++load) {
    const std::uint32_t pack = first + load * kBlockThreads;
    if (!zeros && pack < num_packs) in[load] = reinterpret_cast<const In*>(source)[pack];
  }
  FASTDDP_UNROLL
  for (std::uint32_t load = 0; load < kLoads; ++load) {
    const std::uint32_t pack = first + load * kBlockThreads;
    if (pack >= num_packs) continue;
    Out out;
    FASTDDP_UNROLL
    for (std::uint32_t i = 0; i < kNumel; ++i) {
      out.values[i] = Arithmetic<Dst>::round(Arithmetic<Src>::widen(in[load].values[i]) * scale);
      if constexpr (kMoments) share.add(Arithmetic<Dst>::widen(out.values[i]));
    }
    reinterpret_cast<Out*>(target)[pack] = out;
  }
}

// Moves one thread's part of a chunk. The order in which a share adds depends only on the chunk's
// size and on how both ends of the chunk are aligned to 16 bytes.
template <bool kMoments, typename Src, typename Dst>
FASTDDP_HOST_DEVICE Share<ComputeOf<Dst>> move_chunk(const Chunk<Src, Dst>& chunk,
                                                     std::uint32_t thread,
                                                     ComputeOf<Src> scale) {
  constexpr std::uint32_t kNumel = kPackNumel<Dst>;
  constexpr std::uint32_t kLoads = kChunkBytes / kBlockThreads / (kNumel * sizeof(Src));
  const auto [source, target, numel, zeros] = chunk;
#if defined(__CUDA_ARCH__)
  // The addresses came out of a table, so without this the compiler would assume any address space.
  __builtin_assume(__isGlobal(source));
  __builtin_assume(__isGlobal(target));
#endif
  // A zero stays a zero, even if the scale is infinite or NaN.
  const ComputeOf<Src> factor = zeros ? 1 : scale;
  Share<ComputeOf<Dst>> share;

  // Packs begin where the target is aligned, if the source is aligned there as well.
  const auto past = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(target) %
                                               kAccessBytes / sizeof(Dst));
  const std::uint32_t to_aligned = (kNumel - past) % kNumel;
  const std::uint32_t head = to_aligned < numel ? to_aligned : numel;
  constexpr std::uintptr_t kAlign = alignof(Pack<Src, kNumel>);
  if (!zeros && reinterpret_cast<std::uintptr_t>(source + head) % kAlign != 0) {
    constexpr std::uint32_t kSingles = 8;
    for (std::uint32_t at = thread; at < numel; at += kSingles * kBlockThreads)
      move_packs<kMoments, 1, kSingles>(source, target, numel, at, zeros, factor, share);
    return share;
  }
  const std::uint32_t num_packs = (numel - head) / kNumel;
  move_packs<kMoments, kNumel, kLoads>(source + head, target + head, num_packs, thread, zeros,
                                       factor, share);
  // Fewer elements than two packs are left, at both ends: one for each of the first threads.
  const std::uint32_t moved = num_packs * kNumel;
  if (thread < numel - moved) {
    const std::uint32_t at = thread < head ? thread : thread + moved;
    move_packs<kMoments, 1, 1>(source + at, target + at, 1, 0, zeros, factor, share);
  }
  return share;
}

// The shares of a block's threads are added in a tree of two levels: each of the first kTreeWidth
// threads adds a column of the kBlockThreads values, then one thread adds the kTreeWidth sums. Each
// level waits for the one before.
inline constexpr std::uint32_t kTreeWidth = 16;

FASTDDP_HOST_DEVICE void add_to(Moments& sum, const Moments& other) {
  sum.sum_of_squares += other.sum_of_squares;
  sum.finite = sum.finite != 0 && other.finite != 0 ? 1 : 0;
}

template <typename Compute>
FASTDDP_HOST_DEVICE Moments as_moments(const Share<Compute>& share) {
  return {static_cast<double>(share.sum_of_squares), share.finite ? 1.0 : 0.0};
}

FASTDDP_HOST_DEVICE void add_column(Moments* values, std::uint32_t thread) {
  Moments sum = values[thread];
  FASTDDP_UNROLL
  for (std::uint32_t row = 1; row < kBlockThreads / kTreeWidth; ++row)
    add_to(sum, values[row * kTreeWidth + thread]);
  values[thread] = sum;
}

FASTDDP_HOST_DEVICE Moments add_columns(const Moments* values) {
  Moments sum = values[0];
  FASTDDP_UNROLL
  for (std::uint32_t at = 1; at < kTreeWidth; ++at) add_to(sum, values[at]);
  return sum;
}

// Adds one thread's share of all blocks' moments, before the same tree adds the threads' sums.
FASTDDP_HOST_DEVICE Moments add_blocks(const Moments* blocks,
                                       std::uint64_t num_blocks,
                                       std::uint32_t thread) {
  Moments sum{0, 1};
  for (std::uint64_t block = thread; block < num_blocks; block += kBlockThreads)
    add_to(sum, blocks[block]);
  return sum;
}

}  // namespace fastddp
