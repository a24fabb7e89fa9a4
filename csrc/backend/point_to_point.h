#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/connections.h"
#include "backend/local_group.h"
#include "backend/starter.h"
#include "shm/group.h"
#include "shm/messages.h"

namespace fastddp {

// Messages between two ranks, which the inner backend carries. They are not collectives: the ranks
// that take no part do not hear of them, and they take no turn.
class PointToPoint {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Work = c10::intrusive_ptr<c10d::Work>;

  PointToPoint(int rank, Starter& starter, Connections& connections, const LocalGroup& local);

  Work send(const Tensors& tensors, int to, int tag);
  Work receive(Tensors& tensors, int from, int tag);
  Work receive_from_any(Tensors& tensors, int tag);

 private:
  using Call = std::function<Work()>;

  Work compared(shm::End end, const Tensors& tensors, int peer, int tag, const Call& launch);

  const int rank_;
  Starter& starter_;
  Connections& connections_;
  const std::shared_ptr<shm::Group> group_;
  std::mutex mutex_;
  shm::Messages messages_;
};

}  // namespace fastddp
