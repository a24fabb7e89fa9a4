// One job at a time, in the order of launching: in the launching thread if that waits for it
// anyway, else in a thread of its own. The jobs here are collectives.
//
// A job that the launching thread runs costs no switch of threads. One that it does not wait for
// must not be run there: the other ranks may come to it only after something that this thread has
// still to do.
//
// What a user has chained to the end of a job runs in the thread that ran the job. It may wait for
// another job, so there is always one more thread than are busy with that.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "core/outcome.h"

namespace fastddp {

class Turns : public std::enable_shared_from_this<Turns> {
 public:
  using Body = std::function<void()>;

  // Runs `body` now, after all that was launched before. Throws what it throws. Throws what a
  // signal handler of the script raises before its turn comes: then it does not run, and `at_skip`
  // does, before anything behind it.
  void run(const Body& body, const Body& at_skip = {});

  // Has `body` run in the other thread. What it holds, and the outcome, are kept until it has ended
  // and somebody waits or launches: a Python object must not be freed by a thread that Python may
  // be waiting for.
  void submit(Body body, std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>());

  // As submit(), but frees nothing: within a body, a destructor might wait for a turn.
  void enqueue(Body body, std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>());

  // Whether this thread is within run(), where it must not wait for a turn: a signal handler may
  // have been called there.
  bool is_within() const { return runner_.load() == std::this_thread::get_id(); }

  // Whether run() would start at once.
  bool idle() const;

  // Frees what has ended.
  void sweep();

  // Waits until all that was launched has ended. False if it has not in time.
  bool wait_until_idle(std::chrono::milliseconds timeout);

  // Ends the threads, once all that was submitted has ended. Not to be called within a body. False
  // if some still tell the listener of an outcome when `patience` is over: they are left to end
  // when that does.
  bool stop(std::chrono::milliseconds patience);

 private:
  struct Job {
    std::uint64_t turn = 0;
    Body body;
    std::shared_ptr<Outcome> outcome;
  };

  void work();
  void await_turn(const Body& at_skip);
  void skip();
  void end_turn();
  void ensure_a_free_thread();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t next_ = 0;
  std::uint64_t now_ = 0;
  std::set<std::uint64_t> given_up_;       // turns that nothing runs in
  std::atomic<std::thread::id> runner_{};  // within run()
  std::deque<Job> queue_;
  std::vector<Job> ended_;
  std::vector<std::thread> threads_;
  int live_threads_ = 0;
  int free_threads_ = 0;  // those that do not tell a listener
  bool stopping_ = false;
};

}  // namespace fastddp
