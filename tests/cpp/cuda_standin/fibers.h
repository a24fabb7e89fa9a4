// The threads of one CUDA block as fibers of one thread of the CPU, for cuda_runtime.h beside this.
//
// A thread runs until it ends or meets a barrier. Each that waits there keeps its fiber, and a
// fiber whose thread has ended takes the next one, so a kernel without barriers needs only one.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace standin {

class Block {
 public:
  using Thread = std::function<void(unsigned thread)>;

  // Calls `body` for each thread, upwards or downwards from one barrier to the next: what depends
  // on the order without a barrier in between comes out differently. `enter` is called whenever
  // another thread goes on. Throws what `body` throws, and std::logic_error unless all threads meet
  // at the same barriers.
  void run(unsigned num_threads, bool downwards, Thread enter, Thread body) {
    num_threads_ = num_threads;
    downwards_ = downwards;
    enter_ = std::move(enter);
    body_ = std::move(body);
    num_started_ = num_ended_ = 0;
    waiting_.clear();
    while (num_started_ < num_threads_) resume(take_idle());
    while (!waiting_.empty()) {
      check_barrier();
      for (auto& fiber : std::exchange(waiting_, {})) {
        enter_(fiber->thread);
        resume(std::move(fiber));
      }
    }
  }

  void barrier(const std::source_location& where) {
    running_->barrier = where;
    running_->waits = true;
    leave();
  }

 private:
  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    unsigned thread = 0;
    bool waits = false;  // at `barrier`
    std::source_location barrier;
    void* fake_stack = nullptr;  // the sanitizer's
  };
  using FiberPtr = std::unique_ptr<Fiber>;

  static constexpr std::size_t kStackBytes = 128 * 1024;

  FiberPtr take_idle() {
    if (!idle_.empty()) {
      FiberPtr fiber = std::move(idle_.back());
      idle_.pop_back();
      return fiber;
    }
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    current_ = this;
    makecontext(&fiber->context, &Block::begin, 0);
    return fiber;
  }

  // Lets the fiber run until it waits at a barrier or has no thread left to run.
  void resume(FiberPtr fiber) {
    current_ = this;
    running_ = fiber.get();
    running_->waits = false;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, running_->stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler_, &running_->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    (fiber->waits ? waiting_ : idle_).push_back(std::move(fiber));
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Back to the scheduler; returns when the fiber is resumed.
  void leave() {
    Fiber* fiber = running_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber->fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swapcontext(&fiber->context, &scheduler_);
    entered();
  }

  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(running_->fake_stack, &scheduler_stack_,
                                    &scheduler_stack_bytes_);
#endif
  }

  static void begin() { current_->run_threads(); }

  [[noreturn]] void run_threads() {
    entered();
    while (true) {
      while (num_started_ < num_threads_ && !error_) {
        const unsigned at = num_started_++;
        running_->thread = downwards_ ? num_threads_ - 1 - at : at;
        enter_(running_->thread);
        try {
          body_(running_->thread);
        } catch (...) {
          error_ = std::current_exception();
        }
        ++num_ended_;
      }
      leave();
    }
  }

  void check_barrier() const {
    const auto& first = waiting_.front()->barrier;
    const auto where = [](const std::source_location& at) {
      return std::string(at.file_name()) + ":" + std::to_string(at.line());
    };
    for (const auto& fiber : waiting_) {
      if (where(fiber->barrier) != where(first))
        throw std::logic_error("threads of a block wait at " + where(first) + " and at " +
                               where(fiber->barrier));
    }
    if (num_ended_ > 0)
      throw std::logic_error(std::to_string(num_ended_) +
                             " threads of a block have ended while others wait at " + where(first));
  }

  inline static Block* current_ = nullptr;

  unsigned num_threads_ = 0;
  bool downwards_ = false;
  Thread enter_;
  Thread body_;
  unsigned num_started_ = 0;
  unsigned num_ended_ = 0;
  ucontext_t scheduler_{};
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_bytes_ = 0;
  Fiber* running_ = nullptr;
  std::vector<FiberPtr> waiting_;  // in the order in which they go on
  std::vector<FiberPtr> idle_;
  std::exception_ptr error_;
};

}  // namespace standin
