// Keeps large blocks of memory that were freed, for the next request of about their size.
//
// Every training step allocates the blocks that the step before has freed. malloc gives large ones
// back to the kernel, which hands out zeroed pages for the next: one page fault per page and step.
//
// Invariants, guarded by tests/cpp/block_cache_test.cpp:
// * Never is more held, in use or idle, than limit(): a quarter beyond the most that was in use at
//   once lately. This bounds what keeping memory costs, whatever sizes are asked for. Without the
//   quarter, a small block asked for while large ones are idle would drive one of these out in
//   every step. (Blocks are up to an eighth larger than what was asked for, and count in full.)
// * Lately is the last one to two times the patience: a peak that does not come again is forgotten,
//   and with it the room for idle blocks.
// * A block that nobody has asked for during the patience is freed, at the next call that is told
//   the time.
//
// The patience is time, neither bytes nor steps. Memory that is faulted in anew once in so long
// costs next to nothing, however much it is; and what a job does after its peak may be large or
// small, so neither of these would tell when the peak is over.
//
// Every call takes at most logarithmic time in the number of blocks, and that for each it frees.
// Not synchronised: whoever owns a cache locks.
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

  // A block of at least `bytes`, with whatever an earlier owner left in it.
  void* allocate(std::size_t bytes, Clock::time_point now);
  // Takes back a block of allocate(); says no to any other, which is then the caller's to free.
  bool release(void* block, Clock::time_point now);
  // Frees what has been idle for too long, and what is beyond the limit of a lower peak.
  void decay(Clock::time_point now);
  // Frees every idle block; returns their bytes.
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
  std::unordered_map<void*, std::size_t> blocks_;  // in use, with their sizes
  Blocks idle_blocks_;                             // the longest idle first
  Sizes by_size_;                                  // these, and among equals in the same order
  std::size_t in_use_ = 0, idle_ = 0;              // bytes
  // The most that was in use in the current window of time, and in the one before.
  std::size_t peak_ = 0, peak_before_ = 0;
  Clock::time_point window_begin_;
};

}  // namespace fastddp
