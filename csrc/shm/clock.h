// A counter in shared memory that its rank advances and the others wait for.
//
// Whatever the rank wrote before it advanced is visible to whoever has seen it advance. Waiting
// spins for a moment and then sleeps on a futex, so that a waiting rank does not take a core from a
// rank that computes.
//
// A waker skips the system call where nobody sleeps. That loses no wake-up because each side writes
// before it reads (Dekker's pattern): the waker writes the time and reads the number of sleepers,
// the sleeper adds itself and reads the time, all sequentially consistent. The kernel compares the
// time once more before it puts the sleeper to sleep (U. Drepper, "Futexes Are Tricky", 2011).
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
    // Sequentially consistent, as in sleep(): either this sees the sleeper, or the sleeper sees the
    // time.
    time_.store(time, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
  }

  // Wakes the sleepers although the clock has not advanced.
  void wake();

  // Returns whether the clock reached `time` while spinning.
  bool spin(Time time, std::chrono::nanoseconds limit) const;

  // Sleeps until the clock advances, somebody calls wake(), or `limit` has passed. May also return
  // early, so callers check again.
  void sleep(Time time, std::chrono::nanoseconds limit);

 private:
  alignas(64) std::atomic<Time> time_{0};
  alignas(64) std::atomic<std::uint32_t> sleepers_{0};  // also counts ranks that died asleep
};

static_assert(std::atomic<Time>::is_always_lock_free, "a lock would not be shared");

}  // namespace fastddp::shm
