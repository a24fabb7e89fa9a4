// The collectives that go through memory which the ranks share: which calls can, and how.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <vector>

#include "backend/connections.h"
#include "shm/collectives.h"
#include "shm/group.h"

namespace fastddp {

class NativeCollectives {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Lists = std::vector<Tensors>;

  // `size`: the number of ranks on all hosts.
  NativeCollectives(int rank,
                    int size,
                    const Connections& connections,
                    shm::Group& group,
                    shm::Collectives& collectives);

  // Whether a call can be carried out here, by what this rank passes to it.
  bool can_barrier() const { return !spans_hosts(); }
  bool can_all_reduce(const Tensors& tensors, const c10d::ReduceOp& op) const;
  bool can_broadcast(const Tensors& tensors) const;
  bool can_all_gather(const Lists& outputs, const Tensors& inputs) const;
  bool can_all_gather_whole(const Tensors& outputs, const Tensors& inputs) const;
  bool can_reduce_scatter(const Tensors& outputs,
                          const Lists& inputs,
                          const c10d::ReduceOp& op) const;
  bool can_reduce_scatter_whole(const Tensors& outputs,
                                const Tensors& inputs,
                                const c10d::ReduceOp& op) const;

  // All throw shm::Error, after which the group is broken.
  void barrier(shm::Deadline deadline);
  void all_reduce(const Tensors& tensors, const c10d::ReduceOp& op, shm::Deadline deadline);
  void broadcast(const at::Tensor& tensor, int root, shm::Deadline deadline);
  // One tensor for each rank, or one that holds the parts of all.
  void all_gather(const Tensors& outputs, const at::Tensor& input, shm::Deadline deadline);
  void all_gather_whole(const Tensors& outputs, const Tensors& inputs, shm::Deadline deadline);
  void reduce_scatter(const at::Tensor& output,
                      const Tensors& inputs,
                      const c10d::ReduceOp& op,
                      shm::Deadline deadline);
  void reduce_scatter_whole(const Tensors& outputs,
                            const Tensors& inputs,
                            const c10d::ReduceOp& op,
                            shm::Deadline deadline);

 private:
  bool spans_hosts() const { return static_cast<int>(group_.size()) != size_; }
  void all_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op, shm::Deadline deadline);
  void all_reduce_across(const shm::Operand& operand, Reduction reduction, shm::Deadline deadline);
  // `block`: where all inputs lie one after another, if they do.
  void reduce_scatter(const at::Tensor& output,
                      const Tensors& inputs,
                      const at::Tensor& block,
                      const c10d::ReduceOp& op,
                      shm::Deadline deadline);

  const int rank_;
  const int size_;
  const Connections& connections_;
  shm::Group& group_;
  shm::Collectives& collectives_;
  at::Tensor staging_;  // for what has to be in the heap to cross hosts
};

}  // namespace fastddp
