// How a collective starts, and how what it throws reaches this rank and the others.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/connections.h"
#include "backend/fork_check.h"
#include "core/turns.h"
#include "shm/collectives.h"
#include "shm/group.h"

namespace fastddp {

// One collective as its caller asks for it.
struct Request {
  c10d::OpType type;
  const char* title;                // what a profiler calls it; a literal
  std::vector<at::Tensor> results;  // all that it writes to
  std::chrono::milliseconds timeout;
  bool async;
};

class Starter {
 public:
  using Body = std::function<void(shm::Deadline)>;

  // All that is passed by reference has to outlive leave().
  Starter(int rank,
          int size,
          Connections& connections,
          shm::Group& group,
          shm::Collectives& collectives);

  // Runs `body`, or has it run in another thread if the caller does not wait for it.
  c10::intrusive_ptr<c10d::Work> start(Request request, Body body);

  // Lets the others know of a call that does not happen, and waits for nobody.
  void announce(shm::Kind kind);

  // Refuses a call for this rank's arguments. Where all ranks refuse it, the group is as it was;
  // others that did call hear that this one has refused, on other hosts with the next call here.
  [[noreturn]] void refuse(const std::string& why);
  // Refuses to write into tensors with elements that lie in the same memory.
  void refuse_overlaps(const char* title, const std::vector<at::Tensor>& written);

  // Throws in a forked child and once this rank has left.
  void check_usable() const;
  // Whether no collective is under way; in a forked child none is.
  bool is_idle() const;
  // Number of collectives launched.
  std::uint64_t count() const { return count_.load(std::memory_order_relaxed); }

  // Waits for what is under way, breaks the group if that takes longer than `patience`, and ends
  // the threads.
  void leave(std::chrono::milliseconds patience);

  // Forgets the threads without ending them: in a forked child they are the parent's.
  void leak();

 private:
  void run(const Body& body, std::chrono::milliseconds timeout);
  void skip();
  std::string reason() const;
  void check_not_within() const;
  void tell_other_hosts();
  bool spans_hosts() const { return static_cast<int>(group_.size()) != size_; }

  const int rank_;
  const int size_;
  Connections& connections_;
  shm::Group& group_;
  shm::Collectives& collectives_;
  std::shared_ptr<Turns> turns_ = std::make_shared<Turns>();
  std::atomic<bool> has_left_{false};
  std::atomic<std::uint64_t> count_{0};
  const ForkCheck fork_check_;
};

}  // namespace fastddp
