#include "core/turns.h"

#include <algorithm>
#include <exception>
#include <optional>
#include <system_error>
#include <utility>

#include "core/slow_wait.h"

namespace fastddp {
namespace {

thread_local bool is_worker = false;

}  // namespace

void Turns::run(const Body& body, const Body& at_skip) {
  sweep();  // before the turn is taken: it may run a destructor that takes one
  await_turn(at_skip);
  runner_ = std::this_thread::get_id();
  try {
    body();
  } catch (...) {
    end_turn();
    throw;
  }
  end_turn();
}

void Turns::await_turn(const Body& at_skip) {
  using std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  const std::uint64_t turn = next_++;
  if (now_ == turn) return;
  const auto begin = steady_clock::now();
  std::optional<SlowWait> slow;
  while (!changed_.wait_for(lock, kLookAround, [&] { return now_ == turn; })) {
    lock.unlock();  // what follows may run Python
    try {
      if (!slow)
        slow.emplace(SlowWait::What{board::Source::kOwnThread},
                     "a collective that was launched before, and another thread carries out",
                     steady_clock::now() - begin);
      slow->look();
    } catch (...) {
      if (at_skip) at_skip();
      lock.lock();
      given_up_.insert(turn);
      skip();
      throw;
    }
    lock.lock();
  }
}

void Turns::end_turn() {
  const std::lock_guard lock(mutex_);
  runner_ = std::thread::id();
  ++now_;
  skip();
}

// Goes on to the next turn that somebody waits for, and tells all that the turn has changed.
void Turns::skip() {
  while (given_up_.erase(now_) != 0) ++now_;
  changed_.notify_all();
}

void Turns::submit(Body body, std::shared_ptr<Outcome> outcome) {
  sweep();
  enqueue(std::move(body), std::move(outcome));
}

void Turns::enqueue(Body body, std::shared_ptr<Outcome> outcome) {
  const std::lock_guard lock(mutex_);
  ensure_a_free_thread();  // first: it may throw
  queue_.push_back({next_, std::move(body), std::move(outcome)});
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
    skip();
    lock.unlock();
    const bool has_listener = outcome->set(error);
    lock.lock();
    if (has_listener) {
      --free_threads_;
      try {
        if (!queue_.empty()) ensure_a_free_thread();
      } catch (const std::system_error&) {  // no more threads; what is queued waits for this one
      }
      lock.unlock();
      outcome->tell();
      lock.lock();
      ++free_threads_;
    }
    ended_.push_back({job.turn, {}, std::move(outcome)});
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

}  // namespace fastddp
