// One collective at a time, in the order of launching: in the launching thread if that waits for it
// anyway, else in a thread of its own.
//
// A collective that the launching thread runs costs no switch of threads. One that it does not wait
// for must not be run there: the other ranks may come to it only after something that this thread
// has still to do.
//
// What a user has chained to a future runs in the thread that ran the collective. It may wait for
// another collective, so there is always one more thread than are busy with that.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace fastddp {

// Whether a collective has ended, and how.
class Outcome {
 public:
  // Has `callback` called when the outcome is set. To be called before that.
  void at_end(std::function<void()> callback) { at_end_ = std::move(callback); }
  // Sets the outcome and wakes those who wait. Returns whether there is a future to complete().
  bool set(std::exception_ptr error);
  // Calls what is chained to the future.
  void complete();

  bool is_set() const;
  std::exception_ptr error() const;
  // False if it was not set in time; zero is no limit.
  bool wait(std::chrono::milliseconds timeout) const;
  // Returns the future, which will hold `results`.
  c10::intrusive_ptr<c10::ivalue::Future> future(const std::vector<at::Tensor>& results);

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool set_ = false;
  std::exception_ptr error_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  std::vector<at::Tensor> results_;
  std::function<void()> at_end_;
};

class Turns : public std::enable_shared_from_this<Turns> {
 public:
  using Body = std::function<void()>;

  // Runs `body` now, after all that was launched before. Throws what it throws.
  void run(const Body& body);

  // Has `body` run in the other thread. `results` are kept until it has ended and somebody waits or
  // launches: a Python object must not be freed by a thread that Python may be waiting for.
  void submit(Body body,
              std::vector<at::Tensor> results,
              std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>());

  // As submit(), but frees nothing: within a body, a destructor might wait for a turn.
  void enqueue(Body body,
               std::vector<at::Tensor> results,
               std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>());

  // Whether run() would start at once.
  bool idle() const;

  // Frees what has ended.
  void sweep();

  // Waits until all that was launched has ended. False if it has not in time.
  bool wait_until_idle(std::chrono::milliseconds timeout);

  // Ends the threads, once all that was submitted has ended. Not to be called within a body. False
  // if some are still in what a user has chained to a future when `patience` is over: they are left
  // to end when that does.
  bool stop(std::chrono::milliseconds patience);

 private:
  struct Job {
    std::uint64_t turn = 0;
    Body body;
    std::vector<at::Tensor> results;
    std::shared_ptr<Outcome> outcome;
  };

  void work();
  void end_turn();
  void ensure_a_free_thread();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t next_ = 0;
  std::uint64_t now_ = 0;
  std::deque<Job> queue_;
  std::vector<Job> ended_;
  std::vector<std::thread> threads_;
  int live_threads_ = 0;
  int free_threads_ = 0;  // those not in what is chained to a future
  bool stopping_ = false;
};

// What a collective of ours returns.
class TurnWork final : public c10d::Work {
 public:
  // `title` is what a profiler calls it; a literal.
  TurnWork(c10d::OpType type,
           const char* title,
           std::vector<at::Tensor> results,
           std::shared_ptr<Turns> turns);

  // One of the two starts it. run() returns when it has ended, and throws what it throws.
  void run(const Turns::Body& body);
  void submit(Turns::Body body);

  bool isCompleted() override { return outcome_->is_set(); }
  bool isSuccess() const override { return outcome_->is_set() && !outcome_->error(); }
  std::exception_ptr exception() const override { return outcome_->error(); }
  std::vector<at::Tensor> result() override { return results_; }
  bool wait(std::chrono::milliseconds timeout) override;
  void synchronize() override { wait(kNoTimeout); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    return outcome_->future(results_);
  }

 private:
  const std::vector<at::Tensor> results_;
  const std::shared_ptr<Turns> turns_;
  const std::shared_ptr<Outcome> outcome_ = std::make_shared<Outcome>();
};

}  // namespace fastddp
