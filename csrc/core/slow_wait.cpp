#include "core/slow_wait.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

namespace fastddp {
namespace {

std::atomic<void (*)()> signal_check{nullptr};

struct Order {
  std::uint64_t since_ns;  // of the wait that it is for
  std::string text;
};

// By place. Without a lock, which another thread of the parent might have held at a fork.
std::array<std::atomic<std::uint64_t>, board::kNativeWaits> waits_since;  // 0: takes no orders
std::array<std::atomic<Order*>, board::kNativeWaits> orders;

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
  // What another thread of this process waits in is ended there.
  if (place_.index() < board::kNativeWaits && what.source != board::Source::kOwnThread)
    waits_since[place_.index()] = words_[board::kSince];
}

SlowWait::~SlowWait() {
  if (place_.index() == board::kNativeWaits) return;
  waits_since[place_.index()] = 0;
  delete orders[place_.index()].exchange(nullptr);
}

void SlowWait::look(std::uint64_t missing, std::uint64_t unfinished) {
  words_[board::kMissing] = missing;
  words_[board::kUnfinished] = unfinished;
  place_.write(words_, text_);
  if (auto* const check = signal_check.load()) check();
  if (place_.index() == board::kNativeWaits) return;
  const std::unique_ptr<const Order> order(orders[place_.index()].exchange(nullptr));
  // One that came late for the wait before is none for this one.
  if (order && order->since_ns == words_[board::kSince]) throw WaitFailed(order->text);
}

bool fail_wait(std::size_t place, std::uint64_t since_ns, const std::string& text) {
  if (place >= board::kNativeWaits || since_ns == 0) return false;
  if (waits_since[place] != since_ns) return false;
  delete orders[place].exchange(new Order{since_ns, text});
  return true;
}

}  // namespace fastddp
