// What was handed to another backend. It fails when the group breaks: the other backend would wait
// for its timeout. And it names a rank that has ended, where the other backend knows no more than
// that a connection was closed.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/deadline.h"
#include "core/slow_wait.h"
#include "shm/error.h"
#include "shm/group.h"
#include "tensor/error_text.h"

namespace fastddp {

class HandedWork final : public c10d::Work {
 public:
  // `text` says what it is, and `peers` whom it needs, a bit for each rank.
  HandedWork(c10::intrusive_ptr<c10d::Work> work,
             std::shared_ptr<shm::Group> group,
             std::string text,
             std::uint64_t peers = 0)
      : work_(std::move(work)), group_(std::move(group)), text_(std::move(text)), peers_(peers) {
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
  int sourceRank() const override { return work_->sourceRank(); }
  std::vector<at::Tensor> result() override { return work_->result(); }
  void synchronize() override { work_->synchronize(); }
  void abort() override { work_->abort(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return work_->getFuture(); }

  bool wait(std::chrono::milliseconds timeout) override {
    try {
      if (!tells_when_it_ends_) return work_->wait(timeout);
      wait_for_its_end(timeout);
      return work_->wait(kNoTimeout);
    } catch (const shm::Error& error) {
      TORCH_CHECK_WITH(DistBackendError, false, error.what());
    } catch (const Interruption&) {
      throw;
    } catch (const std::exception& error) {
      explain(error);
      throw;
    }
  }

 private:
  struct Ended {
    std::mutex mutex;
    std::condition_variable changed;
    bool is = false;
  };

  void wait_for_its_end(std::chrono::milliseconds timeout) {
    const auto begin = std::chrono::steady_clock::now();
    const auto deadline = deadline_in(timeout);
    std::optional<SlowWait> slow;
    std::unique_lock lock(ended_->mutex);
    while (!ended_->changed.wait_for(lock, kLookAround, [this] { return ended_->is; })) {
      lock.unlock();  // what follows may run Python
      group_->check();
      TORCH_CHECK_WITH(
          DistBackendError, timeout == kNoTimeout || std::chrono::steady_clock::now() < deadline,
          "fastddp: timed out: a collective did not end within ", timeout.count(), " ms");
      // Its thread need not be the one that carries out the group's collectives, so their numbers
      // and labels are not to be read here.
      if (!slow)
        slow.emplace(SlowWait::What{board::Source::kShm, group_->id()}, text_,
                     std::chrono::steady_clock::now() - begin);
      look(*slow);
      lock.lock();
    }
  }

  void look(SlowWait& wait) const {
    try {
      // Nobody knows here whether these have posted their ends.
      wait.look(/*missing=*/0, /*unfinished=*/peers_);
    } catch (const WaitFailed& error) {
      group_->abort(error.what());
      group_->check();
    }
  }

  // Throws if there is more to say than what the other backend says.
  void explain(const std::exception& error) {
    // The end of a connection is seen a moment before that of its process. Who ended in good order
    // is not to blame for a timeout.
    const bool timed_out = text_of(error).find("imed out") != std::string::npos;
    constexpr int kLooks = 20;
    try {
      group_->check();
      for (int i = 0; i < kLooks && !timed_out; ++i) {
        group_->check_ended();
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    } catch (const shm::Error& error) {
      TORCH_CHECK_WITH(DistBackendError, false, error.what());
    }
  }

  const c10::intrusive_ptr<c10d::Work> work_;
  const std::shared_ptr<shm::Group> group_;
  const std::string text_;
  const std::uint64_t peers_;
  bool tells_when_it_ends_ = true;  // some works of gloo's do not
  const std::shared_ptr<Ended> ended_ = std::make_shared<Ended>();
};

}  // namespace fastddp
