// Keeps large blocks of memory that were freed, for the next request of about their size.
//
// Every training step allocates the blocks that the step before has freed. malloc gives large ones
// back to the kernel, which hands out zeroed pages for the next: one page fault per page and step.
//
// Invariants, guarded by tests/cpp/block_cache_test.cpp:
// * The cache never holds more, in use and idle together, than limit(): a quarter more than the
//   most that was recently in use at once. This bounds the cost of keeping memory, whatever sizes
//   are asked for. Without the quarter, a request for a small block while large ones are idle would
//   evict one of them in every step. (A block may be up to an eighth larger than the request, and
//   counts with its full size.)
// * "Recently" means the last one to two patience periods: a peak that does not come again is
//   forgotten, and with it the room for idle blocks.
// * A block that nobody asks for during one patience period is freed at the next call that takes
//   the time.
//
// The patience is a time, not a number of bytes or steps. Page faults that come once in such a
// period cost next to nothing, however much memory it is; and a job may allocate much or little
// after its peak, so neither bytes nor steps would tell that the peak is over.
//
// A call takes at most logarithmic time in the number of blocks, for itself and for each block that
// it frees.
// Not synchronized: the owner of a cache has to lock.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <list>
#include <map>
#include <unordered_map>

namespace fastddp {

class BlockCache {
 public:
  using Clock = std::chrono::steady_clock;
  using Allocate = void* (*)(std::size_t bytes);  // may throw
  using Free = void (*)(void* block, std::size_t bytes);

  BlockCache(Allocate from, Free to, Clock::duration patience)
      : allocate_(from), free_(to), patience_(patience) {}

  // Returns a block of at least `bytes`, which holds whatever an earlier owner left in it.
  void* allocate(std::size_t bytes, Clock::time_point now);
  // Takes back a block that allocate() returned. Returns false for any other block, which the
  // caller then has to free.
  bool release(void* block, Clock::time_point now);
  // Frees blocks that have been idle for too long, and those that exceed the limit of a lower peak.
  void decay(Clock::time_point now);
  // Frees every idle block; returns the number of bytes.
  std::size_t trim();

  std::size_t in_use() const { return in_use_; }
  std::size_t idle() const { return idle_; }
  std::size_t peak() const { return std::max(peak_, peak_before_); }

  std::size_t limit() const { return peak() + peak() / 4; }  // of in_use() + idle()

  void set_patience(Clock::duration patience) { patience_ = patience; }

 private:
  struct Block {
    void* data;
    std::size_t bytes;
    Clock::time_point freed_at;
  };
  using Blocks = std::list<Block>;
  using Sizes = std::multimap<std::size_t, Blocks::iterator>;

  void* take_idle(std::size_t bytes);
  void begin_window(Clock::time_point now);
  void evict_to(std::size_t bytes);
  void evict_oldest();
  Block take_out(Sizes::iterator entry);

  const Allocate allocate_;
  const Free free_;
  Clock::duration patience_;
  std::unordered_map<void*, std::size_t> blocks_;  // blocks in use, with their sizes
  Blocks idle_blocks_;                             // the longest idle first
  Sizes by_size_;                                  // the idle blocks; equal sizes in the same order
  std::size_t in_use_ = 0, idle_ = 0;              // bytes
  // The most that was in use in the current window of time, and in the one before.
  std::size_t peak_ = 0, peak_before_ = 0;
  Clock::time_point window_begin_;
};

}  // namespace fastddp
