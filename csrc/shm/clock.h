// A counter in shared memory that its rank advances and the others wait for.
//
// Whatever the rank wrote before it advanced is visible to whoever has seen it advance. Waiting
// spins for a moment, then sleeps on a futex, so that a waiting rank does not keep a computing one
// from its core.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace fastddp::shm {

using Time = std::uint64_t;

class Clock {
 public:
  Time now() const { return time_.load(std::memory_order_acquire); }
  bool reached(Time time) const { return now() >= time; }

  // Only the clock's own rank calls this.
  void advance_to(Time time) {
    // Sequentially consistent, as in sleep(): either this sees the sleeper or that sees the time.
    time_.store(time, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
  }

  // Wakes those who sleep, though no time has passed.
  void wake();

  // Returns whether the clock reached `time` while spinning.
  bool spin(Time time, std::chrono::nanoseconds limit) const;

  // Sleeps until the clock moves, somebody calls wake(), or the limit is over.
  void sleep(Time time, std::chrono::nanoseconds limit);

 private:
  alignas(64) std::atomic<Time> time_{0};
  alignas(64) std::atomic<std::uint32_t> sleepers_{0};  // one too many for each who died asleep
};

static_assert(std::atomic<Time>::is_always_lock_free, "a lock would not be shared");

}  // namespace fastddp::shm
