#include "core/outcome.h"

#include "core/deadline.h"

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
  std::unique_lock lock(mutex_);
  if (timeout.count() > 0)
    return changed_.wait_until(lock, deadline_in(timeout), [this] { return set_; });
  changed_.wait(lock, [this] { return set_; });
  return true;
}

}  // namespace fastddp
