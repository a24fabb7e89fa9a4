#include "backend/turn_work.h"

#include <ATen/core/ivalue_inl.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <utility>

namespace fastddp {

c10::intrusive_ptr<c10::ivalue::Future> FutureOutcome::future(
    const std::vector<at::Tensor>& results) {
  listen([&] {
    future_ =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    results_ = results;
  });
  return future_;
}

void FutureOutcome::tell() {
  const c10::NoGradGuard no_grad;  // a thread of ours starts with gradients on
  if (const auto failure = error()) {
    future_->setError(failure);
  } else {
    future_->markCompleted(c10::IValue(results_));
  }
}

TurnWork::TurnWork(c10d::OpType type,
                   const char* title,
                   std::vector<at::Tensor> results,
                   std::shared_ptr<Turns> turns)
    : Work(-1, type, title, results), results_(std::move(results)), turns_(std::move(turns)) {
  if (recordFunctionEndCallback_) outcome_->at_end(std::move(recordFunctionEndCallback_));
}

void TurnWork::run(const Turns::Body& body, const Turns::Body& at_skip) {
  try {
    turns_->run(body, at_skip);
  } catch (...) {
    outcome_->set(std::current_exception());
    throw;
  }
  outcome_->set(nullptr);
}

void TurnWork::submit(Turns::Body body) { turns_->submit(std::move(body), outcome_); }

bool TurnWork::wait(std::chrono::milliseconds timeout) {
  TORCH_CHECK_WITH(DistBackendError, outcome_->wait(timeout),
                   "fastddp: timed out: a collective did not end within ", timeout.count(), " ms");
  turns_->sweep();
  if (const auto error = outcome_->error()) std::rethrow_exception(error);
  return true;
}

}  // namespace fastddp
