#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>

namespace fastddp {

// Whether a job has ended, and how. A derived class may have a listener that is told.
class Outcome {
 public:
  Outcome() = default;
  Outcome(const Outcome&) = delete;
  Outcome& operator=(const Outcome&) = delete;
  virtual ~Outcome() = default;

  // Has `callback` called when the outcome is set. To be called before that.
  void at_end(std::function<void()> callback) { at_end_ = std::move(callback); }

  // Sets the outcome and wakes those who wait. Returns whether there is a listener to tell(): that
  // is left to the caller, since it may take long.
  bool set(std::exception_ptr error);

  // Tells the listener. Called once, without a lock, after the outcome was set and a listener made.
  virtual void tell() {}

  bool is_set() const;
  std::exception_ptr error() const;
  // False if it was not set in time; zero means no limit. Throws what a signal handler of the
  // script raises meanwhile; it may be waited for again then.
  bool wait(std::chrono::milliseconds timeout) const;

 protected:
  // Has the one listener made by `make` unless there is one already. Whoever is second, this or
  // set(), sees that it is told: here if the outcome is set.
  void listen(const std::function<void()>& make);

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool set_ = false;
  bool has_listener_ = false;
  std::exception_ptr error_;
  std::function<void()> at_end_;
};

}  // namespace fastddp
