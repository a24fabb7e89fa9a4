// What the collectives have in common: how an operand is cut into parts and chunks, and how chunks
// go through the slots of the group's segment. Only the files of this folder include it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/stream.h"
#include "shm/collectives.h"
#include "shm/error.h"
#include "shm/heap.h"

namespace fastddp::shm {

// Up to this size, a copy costs less than the second wait of the direct path.
inline constexpr std::size_t kFewBytes = std::size_t{8} << 10;

inline constexpr std::size_t kCacheLine = 64;

struct Range {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t size() const { return end - begin; }
};

// Returns part `index` of `count` parts of the elements. In an operand that is aligned to cache
// lines, parts begin at cache lines, so no two ranks write to the same line.
inline Range part_of(std::size_t numel,
                     std::size_t element_bytes,
                     std::size_t index,
                     std::size_t count) {
  const std::size_t line = kCacheLine / element_bytes;
  const std::size_t lines = (numel + line - 1) / line;
  const auto at = [&](std::size_t i) { return std::min(numel, lines * i / count * line); };
  return {at(index), at(index + 1)};
}

inline std::size_t num_chunks(std::size_t numel, std::size_t chunk) {
  return numel == 0 ? 1 : (numel + chunk - 1) / chunk;
}

inline Range chunk_of(std::size_t numel, std::size_t chunk, std::size_t index) {
  return {std::min(numel, index * chunk), std::min(numel, (index + 1) * chunk)};
}

// Where an operand lies in this rank's heap, as a Call announces it.
inline std::uint64_t place_in_heap(const void* data, std::size_t bytes) {
  const Heap& heap = Heap::mine();
  if (!heap.contains(data, bytes)) return Call::kElsewhere;
  return static_cast<std::uint64_t>(static_cast<const char*>(data) - heap.data());
}

// A memcpy whose operands may be null where there is nothing to copy.
inline void copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

// Throws Error where the operation means nothing for these elements.
inline Reduce must_find_reduce(Element element, Reduction reduction) {
  const Reduce reduce = find_reduce(element, reduction);
  if (reduce == nullptr) throw Error("fastddp: there is no such reduction of this dtype");
  return reduce;
}

// Meets the other ranks, unless there are so few bytes that they travel with the first step.
// Returns whether all operands lie in heaps.
inline bool Collectives::meet(std::size_t bytes) {
  if (bytes <= kFewBytes) return false;
  group_.await_all(group_.advance());
  // A rank that was stopped meanwhile must not write to ranks that have given up.
  group_.check_current();
  return group_.all_direct();
}

// Copies data into one of this rank's slots.
inline void Collectives::stage(std::size_t slot,
                               std::size_t at,
                               const void* from,
                               std::size_t bytes) {
  char* const to = group_.slot(group_.me(), slot) + at;
  if (bytes > kFewBytes) {
    stream_copy(to, from, bytes);
  } else {
    copy(to, from, bytes);
  }
}

// Calls fill(chunk, slot) to copy each chunk of this rank into a slot and, kLag chunks later,
// drain(chunk, slot) to read that chunk from the slots of all ranks.
template <typename Fill, typename Drain>
void Collectives::go_in_chunks(std::size_t count, const Fill& fill, const Drain& drain) {
  std::array<std::size_t, kSlots> slots{};
  std::array<Time, kSlots> steps{};
  for (std::size_t i = 0; i < count + kLag; ++i) {
    if (i < count) {
      slots[i % kSlots] = group_.claim_slot();
      fill(i, slots[i % kSlots]);
      steps[i % kSlots] = group_.advance();
    }
    if (i < kLag || i - kLag >= count) continue;
    group_.await_all(steps[(i - kLag) % kSlots]);
    drain(i - kLag, slots[(i - kLag) % kSlots]);
  }
}

}  // namespace fastddp::shm
