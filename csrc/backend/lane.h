#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <exception>
#include <vector>

#include "backend/connections.h"
#include "shm/group.h"

namespace fastddp {

// What this rank does together with those that have its place on the other hosts, by a deadline.
// What fails there breaks the group here.
class Lane {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;

  Lane(const Lanes& lanes, shm::Group& group, shm::Deadline deadline)
      : lanes_(lanes), group_(group), deadline_(deadline) {}

  const std::vector<int>& ranks() const { return lanes_.ranks; }

  // Returns what each of the ranks gave, tensors of one shape.
  std::vector<at::Tensor> gather(const at::Tensor& mine);

  // Starts to reduce over the ranks, in place.
  Work all_reduce(const at::Tensor& part, c10d::ReduceOp::RedOpType op);

  void await(c10d::Work& work);

 private:
  template <typename Options, typename Launch>
  Work launched(const Launch& launch);
  [[noreturn]] void fail(const std::exception& error);

  const Lanes& lanes_;
  shm::Group& group_;
  const shm::Deadline deadline_;
};

}  // namespace fastddp
