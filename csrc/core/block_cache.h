// Keeps large blocks of memory that were freed, for the next request of about their size.
//
// Every training step allocates the blocks that the step before has freed. malloc gives large ones
// back to the kernel, which hands out zeroed pages for the next: one page fault per page and step.
//
// Invariants, guarded by tests/cpp/block_cache_test.cpp:
// * Never is more held, in use or idle, than limit(): a quarter beyond the most that was ever in
// use
//   at once. This bounds what keeping memory costs, whatever sizes are asked for. Without the
//   quarter, a small block asked for while large ones are idle would drive one of these out in
//   every step. (Blocks are up to an eighth larger than what was asked for, and count in full.)
// * A block that is not asked for while kPatience times that peak is allocated is freed: a peak
// that
//   does not come again is given back.
//
// Not synchronised: whoever owns a cache locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace fastddp {

class BlockCache {
 public:
  using Allocate = void* (*)(std::size_t bytes);  // may throw
  using Free = void (*)(void* block);

  BlockCache(Allocate from, Free to) : allocate_(from), free_(to) {}

  // A block of at least `bytes`, with whatever an earlier owner left in it.
  void* allocate(std::size_t bytes);
  // Takes back a block of allocate(); says no to any other, which is then the caller's to free.
  bool release(void* block);
  // Frees every idle block.
  void trim() { evict_to(0); }

  std::size_t in_use() const { return in_use_; }
  std::size_t idle() const { return idle_; }
  std::size_t peak() const { return peak_; }

  std::size_t limit() const { return peak_ + peak_ / 4; }  // of in_use() + idle()

  static constexpr std::uint64_t kPatience = 16;

 private:
  struct Block {
    void* data;
    std::size_t bytes;
    std::uint64_t freed_at;  // in bytes ever allocated
  };

  void* take_idle(std::size_t bytes);
  void evict_to(std::size_t bytes);
  void evict_oldest();

  const Allocate allocate_;
  const Free free_;
  std::unordered_map<void*, std::size_t> blocks_;  // in use, with their sizes
  std::vector<Block> idle_blocks_;                 // the longest idle first
  std::size_t in_use_ = 0, idle_ = 0, peak_ = 0;   // bytes
  std::uint64_t allocated_ = 0;                    // bytes, ever
};

}  // namespace fastddp
