// The process group of a reducer, and the collectives that it starts there.
//
// Invariant: a reducer never owns its process group. Freeing a group joins the group's threads;
// doing so from a destructor that holds the GIL deadlocks. (tests/parity/test_launch.py)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/launch_order.h"
#include "reducer/launch.h"

namespace fastddp {

class Group {
 public:
  // `owner` is the number that tells the collectives of one reducer from those of another.
  // `device` is that of all tensors.
  Group(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
        std::uint32_t owner,
        c10::Device device);

  int rank() const { return rank_; }
  int size() const { return size_; }
  // What the group is called on the board.
  std::uint64_t id() const { return id_; }

  // Throws if the script has destroyed the group.
  c10::intrusive_ptr<c10d::ProcessGroup> get() const;

  // Starts the all-reduce that is launch `number` of a round. `waits`: whether the caller goes on
  // to wait for it at once, so that it may run in this thread.
  Wait start_all_reduce(at::Tensor tensor, std::size_t number, bool waits = false) const;

  // Waits for one of these works; `text` says what it is.
  void wait_for(c10d::Work& work, const char* text) const;

  // Starts a collective that belongs to no bucket.
  c10::intrusive_ptr<c10d::Work> all_reduce(std::vector<at::Tensor>& tensors) const;
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors) const;

 private:
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> group_;
  const std::uint32_t owner_;
  const int rank_;
  const int size_;
  const std::uint64_t id_;
  // Whether waits for works look around here: the host waits for gloo, which does not, and puts up
  // with short waits. Other transports may take the end of a short wait for a failure.
  const bool is_patient_;
};

// Whether the group's backend for CPU tensors is our own. It runs a collective in the thread that
// launches it, if that thread is going to wait: then waiting at once costs no switch of threads.
bool runs_inline(c10d::ProcessGroup& group);

// The order of launching in a group, shared by the reducers on it.
std::shared_ptr<LaunchOrder> order_of(const c10d::ProcessGroup& group);

}  // namespace fastddp
