#include "shm/clock.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <climits>
#include <ctime>

namespace fastddp::shm {
namespace {

// Uses the low half of the time, because a futex has 32 bits. Without FUTEX_PRIVATE_FLAG, because
// several processes map the memory.
void futex(const std::atomic<Time>& time, int operation, Time value, const timespec* timeout) {
  const auto* word = reinterpret_cast<const std::uint32_t*>(&time);
  if constexpr (std::endian::native == std::endian::big) ++word;
  ::syscall(SYS_futex, word, operation, static_cast<std::uint32_t>(value), timeout, nullptr, 0);
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Clock::wake() { futex(time_, FUTEX_WAKE, INT_MAX, nullptr); }

bool Clock::spin(Time time, std::chrono::nanoseconds limit) const {
  constexpr int kLooksBetweenReadings = 32;
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < kLooksBetweenReadings; ++i) {
      if (reached(time)) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return reached(time);
}

void Clock::sleep(Time time, std::chrono::nanoseconds limit) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(limit);
  const timespec timeout{static_cast<time_t>(seconds.count()),
                         static_cast<long>((limit - seconds).count())};
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  const Time seen = time_.load(std::memory_order_seq_cst);
  if (seen < time) futex(time_, FUTEX_WAIT, seen, &timeout);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace fastddp::shm
