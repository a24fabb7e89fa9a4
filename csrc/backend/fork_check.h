// Tells the process that made an object from a child that was forked later. The child has a copy of
// the object, but neither the threads behind it nor the other ends of its connections.
#pragma once

#include <pthread.h>

#include <atomic>

namespace fastddp {

class ForkCheck {
 public:
  ForkCheck() : forks_at_first_(count_from_now_on()) {}

  // Whether this process was forked from the one that made this object.
  bool is_forked() const { return forks_.load(std::memory_order_relaxed) != forks_at_first_; }

 private:
  static unsigned count_from_now_on() {
    [[maybe_unused]] static const int registered =
        ::pthread_atfork(nullptr, nullptr, [] { forks_.fetch_add(1); });
    return forks_.load(std::memory_order_relaxed);
  }

  // How many forks lie between the first process and this one.
  static inline std::atomic<unsigned> forks_{0};

  const unsigned forks_at_first_;
};

}  // namespace fastddp
