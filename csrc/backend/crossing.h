#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstddef>
#include <deque>

#include "backend/lane.h"
#include "kernels/reduce.h"
#include "shm/collectives.h"

namespace fastddp {

// The parts of one all-reduce on their way through a lane.
class Crossing final : public shm::CrossHosts {
 public:
  Crossing(Lane lane, shm::Group& group, Element element, Reduction reduction);

  void compare(const shm::Call& call) override;
  void start(void* data, std::size_t numel) override;
  void finish() override;

 private:
  Lane lane_;
  shm::Group& group_;
  const at::ScalarType dtype_;
  const c10d::ReduceOp::RedOpType op_;
  std::deque<Lane::Work> under_way_;  // null for a part without elements
};

}  // namespace fastddp
