#include "backend/turns.h"

#include <ATen/core/ivalue_inl.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "backend/deadline.h"

namespace fastddp {
namespace {

thread_local bool is_worker = false;

}  // namespace

// ---- Outcome ---------------------------------------------------------------------------

bool Outcome::set(std::exception_ptr error) {
  if (at_end_) at_end_();
  const std::lock_guard lock(mutex_);
  set_ = true;
  error_ = std::move(error);
  changed_.notify_all();
  return static_cast<bool>(future_);
}

// Outside the lock: this calls what the user has chained to the future.
void Outcome::complete() {
  if (error_) {
    future_->setError(error_);
  } else {
    future_->markCompleted(c10::IValue(results_));
  }
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

c10::intrusive_ptr<c10::ivalue::Future> Outcome::future(const std::vector<at::Tensor>& results) {
  {
    const std::lock_guard lock(mutex_);
    if (future_) return future_;
    future_ =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    results_ = results;
    if (!set_) return future_;
  }
  complete();
  return future_;
}

// ---- Turns -----------------------------------------------------------------------------

void Turns::run(const Body& body) {
  sweep();  // before the turn is taken: it may run a destructor that takes one
  {
    std::unique_lock lock(mutex_);
    const std::uint64_t turn = next_++;
    changed_.wait(lock, [&] { return now_ == turn; });
  }
  try {
    body();
  } catch (...) {
    end_turn();
    throw;
  }
  end_turn();
}

void Turns::end_turn() {
  const std::lock_guard lock(mutex_);
  ++now_;
  changed_.notify_all();
}

void Turns::submit(Body body, std::vector<at::Tensor> results, std::shared_ptr<Outcome> outcome) {
  sweep();
  enqueue(std::move(body), std::move(results), std::move(outcome));
}

void Turns::enqueue(Body body, std::vector<at::Tensor> results, std::shared_ptr<Outcome> outcome) {
  const std::lock_guard lock(mutex_);
  ensure_a_free_thread();  // first: it may throw
  queue_.push_back({next_, std::move(body), std::move(results), std::move(outcome)});
  ++next_;
  changed_.notify_all();
}

void Turns::ensure_a_free_thread() {
  if (free_threads_ > 0) return;
  threads_.emplace_back([self = shared_from_this()] { self->work(); });
  ++free_threads_;
  ++live_threads_;
}

bool Turns::idle() const {
  const std::lock_guard lock(mutex_);
  return next_ == now_;
}

bool Turns::wait_until_idle(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [this] { return next_ == now_; });
}

void Turns::sweep() {
  std::vector<Job> ended;
  const std::lock_guard lock(mutex_);
  if (!is_worker) ended.swap(ended_);
}

void Turns::work() {
  is_worker = true;
  const c10::NoGradGuard no_grad;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock,
                  [this] { return queue_.empty() ? stopping_ : queue_.front().turn == now_; });
    if (queue_.empty()) {
      --free_threads_;
      --live_threads_;
      changed_.notify_all();
      return;
    }
    Job job = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      job.body();
    } catch (...) {
      error = std::current_exception();
    }
    auto outcome = job.outcome;
    lock.lock();
    ended_.push_back(std::move(job));
    ++now_;
    changed_.notify_all();
    lock.unlock();
    const bool has_future = outcome->set(error);
    lock.lock();
    if (has_future) {
      --free_threads_;
      try {
        if (!queue_.empty()) ensure_a_free_thread();
      } catch (const std::system_error&) {  // no more threads; what is queued waits for this one
      }
      lock.unlock();
      outcome->complete();
      lock.lock();
      ++free_threads_;
    }
    ended_.push_back({.outcome = std::move(outcome)});
  }
}

bool Turns::stop(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
  // Bodies end by their deadlines, and use what their launcher is about to free.
  changed_.wait(lock, [this] { return next_ == now_; });
  if (threads_.empty()) return true;
  // This may be one of the threads itself, in a destructor that a callback runs.
  const auto me = std::this_thread::get_id();
  const auto is_me = [&](const std::thread& thread) { return thread.get_id() == me; };
  const int own = std::any_of(threads_.begin(), threads_.end(), is_me) ? 1 : 0;
  const bool ended = changed_.wait_for(lock, patience, [&] { return live_threads_ <= own; });
  std::vector<std::thread> threads;
  threads.swap(threads_);
  lock.unlock();
  for (std::thread& thread : threads) {
    if (!ended || is_me(thread)) {
      thread.detach();
    } else {
      thread.join();
    }
  }
  return ended;
}

// ---- TurnWork --------------------------------------------------------------------------

TurnWork::TurnWork(c10d::OpType type,
                   const char* title,
                   std::vector<at::Tensor> results,
                   std::shared_ptr<Turns> turns)
    : Work(-1, type, title, results), results_(std::move(results)), turns_(std::move(turns)) {
  if (recordFunctionEndCallback_) outcome_->at_end(std::move(recordFunctionEndCallback_));
}

void TurnWork::run(const Turns::Body& body) {
  try {
    turns_->run(body);
  } catch (...) {
    outcome_->set(std::current_exception());
    throw;
  }
  outcome_->set(nullptr);
}

void TurnWork::submit(Turns::Body body) { turns_->submit(std::move(body), results_, outcome_); }

bool TurnWork::wait(std::chrono::milliseconds timeout) {
  TORCH_CHECK_WITH(DistBackendError, outcome_->wait(timeout),
                   "fastddp: timed out: a collective did not end within ", timeout.count(), " ms");
  turns_->sweep();
  if (const auto error = outcome_->error()) std::rethrow_exception(error);
  return true;
}

}  // namespace fastddp
