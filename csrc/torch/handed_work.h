// A collective that was handed to another backend, and that fails when the group breaks: the other
// backend would wait for its timeout. (A future of it still does.)
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "torch/deadline.h"

namespace fastddp {

class HandedWork final : public c10d::Work {
 public:
  // `check` throws if the group is broken; it is called by whoever waits.
  HandedWork(c10::intrusive_ptr<c10d::Work> work, std::function<void()> check)
      : work_(std::move(work)), check_(std::move(check)) {
    try {
      work_->getFuture()->addCallback([ended = ended_](c10::ivalue::Future&) {
        const std::lock_guard lock(ended->mutex);
        ended->is = true;
        ended->changed.notify_all();
      });
    } catch (const c10::Error&) {
      tells_when_it_ends_ = false;
    }
  }

  bool isCompleted() override { return work_->isCompleted(); }
  bool isSuccess() const override { return work_->isSuccess(); }
  std::exception_ptr exception() const override { return work_->exception(); }
  std::vector<at::Tensor> result() override { return work_->result(); }
  void synchronize() override { work_->synchronize(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return work_->getFuture(); }

  bool wait(std::chrono::milliseconds timeout) override {
    if (!tells_when_it_ends_) return work_->wait(timeout);
    constexpr std::chrono::milliseconds kLookAround{50};
    const auto deadline = deadline_in(timeout);
    {
      std::unique_lock lock(ended_->mutex);
      while (!ended_->changed.wait_for(lock, kLookAround, [this] { return ended_->is; })) {
        check_();
        TORCH_CHECK_WITH(
            DistBackendError, timeout == kNoTimeout || std::chrono::steady_clock::now() < deadline,
            "fastddp: timed out: a collective did not end within ", timeout.count(), " ms");
      }
    }
    return work_->wait(kNoTimeout);
  }

 private:
  struct Ended {
    std::mutex mutex;
    std::condition_variable changed;
    bool is = false;
  };

  const c10::intrusive_ptr<c10d::Work> work_;
  const std::function<void()> check_;
  bool tells_when_it_ends_ = true;  // some works of gloo's do not
  const std::shared_ptr<Ended> ended_ = std::make_shared<Ended>();
};

}  // namespace fastddp
