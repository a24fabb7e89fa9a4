#include <stdexcept>

#include "kernels/dtype_pairs.h"
#include "kernels/fused_flatten.h"
#include "kernels/fused_flatten_body.h"

namespace fastddp {
namespace {

template <typename Src, typename Dst>
void move(const FlattenLaunch& launch, void* flat, bool to_flat, ComputeOf<Src> scale) {
  const auto num_spans = static_cast<std::uint32_t>(launch.spans.size());
  for (std::uint32_t block = 0; block < launch.num_blocks; ++block) {
    const auto chunk = find_chunk<Src, Dst>(launch.spans.data(), num_spans, block, flat, to_flat);
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread)
      move_chunk<false>(chunk, thread, scale);
  }
}

// Both steps begin where the kernel has barriers.
Moments add_threads(Moments* values) {
  for (std::uint32_t thread = 0; thread < kTreeWidth; ++thread) add_column(values, thread);
  return add_columns(values);
}

template <typename Src, typename Dst>
void move(const FlattenLaunch& launch,
          void* flat,
          ComputeOf<Src> scale,
          std::vector<Moments>& blocks) {
  const auto num_spans = static_cast<std::uint32_t>(launch.spans.size());
  Moments values[kBlockThreads];
  for (std::uint32_t block = 0; block < launch.num_blocks; ++block) {
    const auto chunk = find_chunk<Src, Dst>(launch.spans.data(), num_spans, block, flat, true);
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread)
      values[thread] = as_moments(move_chunk<true>(chunk, thread, scale));
    blocks.push_back(add_threads(values));
  }
}

Moments add_all(const std::vector<Moments>& blocks) {
  Moments values[kBlockThreads];
  for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread)
    values[thread] = add_blocks(blocks.data(), blocks.size(), thread);
  return add_threads(values);
}

}  // namespace

void fused_flatten(const FlatPass& pass,
                   const std::vector<Piece>& pieces,
                   void* flat,
                   Moments* moments) {
  const auto launches = flatten_launches(pass, pieces);
  with_types(pass.piece, pass.flat, [&](auto source, auto target) {
    using Src = typename decltype(source)::Type;
    using Dst = typename decltype(target)::Type;
    const auto scale = static_cast<ComputeOf<Src>>(pass.scale);
    if (moments == nullptr) {
      for (const auto& launch : launches) move<Src, Dst>(launch, flat, true, scale);
      return;
    }
    std::vector<Moments> blocks;
    for (const auto& launch : launches) move<Src, Dst>(launch, flat, scale, blocks);
    *moments = add_all(blocks);
  });
}

void fused_unflatten(const FlatPass& pass, const std::vector<Piece>& pieces, const void* flat) {
  const auto launches = unflatten_launches(pass, pieces);
  with_types(pass.flat, pass.piece, [&](auto source, auto target) {
    using Src = typename decltype(source)::Type;
    using Dst = typename decltype(target)::Type;
    const auto scale = static_cast<ComputeOf<Src>>(pass.scale);
    // In this direction, `flat` is only read.
    for (const auto& launch : launches)
      move<Src, Dst>(launch, const_cast<void*>(flat), false, scale);
  });
}

}  // namespace fastddp
