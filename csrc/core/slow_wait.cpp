#include "core/slow_wait.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

namespace fastddp {
namespace {

std::atomic<void (*)()> signal_check{nullptr};

struct Order {
  std::uint64_t since_ns = 0;  // of the wait that has the place now; 0 for none
  std::string text;            // empty: to go on waiting
};

// Only slow waits come here, every kLookAround.
std::mutex orders_mutex;
std::array<Order, board::kNativeWaits> orders;

std::uint64_t since_ns(std::chrono::nanoseconds lasted) {
  // The steady clock is CLOCK_MONOTONIC, which is what Python's time.monotonic_ns() reads.
  const auto since = std::chrono::steady_clock::now() - lasted;
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(since.time_since_epoch()).count());
}

}  // namespace

void set_signal_check(void (*check)()) { signal_check.store(check); }

SlowWait::SlowWait(const What& what, std::string text, std::chrono::nanoseconds lasted)
    : text_(std::move(text)) {
  words_[board::kSince] = since_ns(lasted);
  words_[board::kWaitGroup] = what.group;
  words_[board::kNumber] = what.number;
  words_[board::kLabel] = what.label;
  words_[board::kThread] = static_cast<std::uint64_t>(::syscall(SYS_gettid));
  words_[board::kSource] = static_cast<std::uint64_t>(what.source);
  if (place_.index() == board::kNativeWaits) return;
  const std::lock_guard lock(orders_mutex);
  orders[place_.index()] = {words_[board::kSince], {}};
}

SlowWait::~SlowWait() {
  if (place_.index() == board::kNativeWaits) return;
  const std::lock_guard lock(orders_mutex);
  orders[place_.index()] = {};
}

void SlowWait::look(std::uint64_t missing, std::uint64_t unfinished) {
  words_[board::kMissing] = missing;
  words_[board::kUnfinished] = unfinished;
  place_.write(words_, text_);
  if (auto* const check = signal_check.load()) check();
  if (place_.index() == board::kNativeWaits) return;
  std::string text;
  {
    const std::lock_guard lock(orders_mutex);
    text.swap(orders[place_.index()].text);
  }
  if (!text.empty()) throw WaitFailed(text);
}

bool fail_wait(std::size_t place, std::uint64_t since_ns, const std::string& text) {
  if (place >= board::kNativeWaits || since_ns == 0) return false;
  const std::lock_guard lock(orders_mutex);
  if (orders[place].since_ns != since_ns) return false;
  orders[place].text = text;
  return true;
}

}  // namespace fastddp
