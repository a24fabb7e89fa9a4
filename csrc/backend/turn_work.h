// What a collective that takes a turn returns: torch's side of a job of core/turns.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <exception>
#include <memory>
#include <vector>

#include "core/outcome.h"
#include "core/turns.h"

namespace fastddp {

// An outcome with a future, if somebody asks for that.
class FutureOutcome final : public Outcome {
 public:
  // Returns the future, which will hold `results`.
  c10::intrusive_ptr<c10::ivalue::Future> future(const std::vector<at::Tensor>& results);

  // Calls what is chained to the future.
  void tell() override;

 private:
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  std::vector<at::Tensor> results_;
};

class TurnWork final : public c10d::Work {
 public:
  // `title` is what a profiler calls it; a literal.
  TurnWork(c10d::OpType type,
           const char* title,
           std::vector<at::Tensor> results,
           std::shared_ptr<Turns> turns);

  // One of the two starts it. run() returns when it has ended, and throws what it throws.
  void run(const Turns::Body& body, const Turns::Body& at_skip);
  // What `body` writes to has to be held by it, since the caller may drop this at any time.
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
  const std::shared_ptr<FutureOutcome> outcome_ = std::make_shared<FutureOutcome>();
};

}  // namespace fastddp
