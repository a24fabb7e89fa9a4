// A collective that was handed to another backend, and that fails when the group breaks: the other
// backend would wait for its timeout.
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
    } catch (const c10::Error&) {  // some works of gloo's have none
      look_around_ = std::chrono::milliseconds(1);
    }
  }

  bool isCompleted() override { return work_->isCompleted(); }
  bool isSuccess() const override { return work_->isSuccess(); }
  std::exception_ptr exception() const override { return work_->exception(); }
  std::vector<at::Tensor> result() override { return work_->result(); }
  void synchronize() override { work_->synchronize(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return work_->getFuture(); }

  bool wait(std::chrono::milliseconds timeout) override {
    using std::chrono::steady_clock;
    const auto deadline = steady_clock::now() + timeout;
    {
      std::unique_lock lock(ended_->mutex);
      while (!ended_->changed.wait_for(lock, look_around_, [this] { return ended_->is; })) {
        if (work_->isCompleted()) break;
        check_();
        TORCH_CHECK_WITH(DistBackendError, timeout == kNoTimeout || steady_clock::now() < deadline,
                         "fastddp: timed out: a collective did not end within ", timeout.count(),
                         " ms");
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
  std::chrono::milliseconds look_around_{50};
  const std::shared_ptr<Ended> ended_ = std::make_shared<Ended>();
};

}  // namespace fastddp
