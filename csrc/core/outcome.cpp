#include "core/outcome.h"

#include <algorithm>
#include <optional>

#include "core/deadline.h"
#include "core/slow_wait.h"

namespace fastddp {

bool Outcome::set(std::exception_ptr error) {
  if (at_end_) at_end_();
  const std::lock_guard lock(mutex_);
  set_ = true;
  error_ = std::move(error);
  changed_.notify_all();
  return has_listener_;
}

void Outcome::listen(const std::function<void()>& make) {
  {
    const std::lock_guard lock(mutex_);
    if (has_listener_) return;
    make();
    has_listener_ = true;
    if (!set_) return;
  }
  tell();
}

bool Outcome::is_set() const {
  const std::lock_guard lock(mutex_);
  return set_;
}

std::exception_ptr Outcome::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

bool Outcome::wait(std::chrono::milliseconds timeout) const {
  using std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  if (set_) return true;
  const auto begin = steady_clock::now();
  const auto end = timeout.count() > 0 ? deadline_in(timeout) : steady_clock::time_point::max();
  std::optional<SlowWait> slow;
  while (true) {
    const auto look = std::min(steady_clock::now() + kLookAround, end);
    if (changed_.wait_until(lock, look, [this] { return set_; })) return true;
    if (steady_clock::now() >= end) return false;
    lock.unlock();  // what follows may run Python
    if (!slow)
      slow.emplace(SlowWait::What{board::Source::kOwnThread},
                   "a collective that another thread of this process carries out",
                   steady_clock::now() - begin);
    slow->look();
    lock.lock();
  }
}

}  // namespace fastddp
