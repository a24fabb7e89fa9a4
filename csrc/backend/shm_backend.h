// The c10d backend `shm`: collectives through shared memory where they are hot and the ranks share
// a host, and through another backend otherwise.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/connections.h"
#include "backend/fork_check.h"
#include "backend/handed.h"
#include "backend/local_group.h"
#include "backend/native.h"
#include "backend/point_to_point.h"
#include "backend/starter.h"
#include "shm/collectives.h"
#include "shm/segment.h"

namespace fastddp {

class ShmBackend final : public c10d::Backend {
 public:
  // Maps what the other ranks have announced. Throws shm::Error that says what is in the way. The
  // collectives' timeout is the inner backend's; `patience`: how long leaving may take at most.
  ShmBackend(int rank,
             int size,
             c10::intrusive_ptr<c10d::Backend> inner,
             const LocalRanks& local,
             std::chrono::milliseconds patience);
  ~ShmBackend() override;

  // Makes the segment that the ranks of a host share; the lowest of them calls this.
  static shm::Segment make_control(std::size_t ranks) { return LocalGroup::make_control(ranks); }

  // For a group that spans hosts; before the first collective.
  void set_lanes(Lanes lanes) { connections_.set_lanes(std::move(lanes)); }

  const c10::intrusive_ptr<c10d::Backend>& inner() const { return connections_.inner(); }
  bool spans_hosts() const { return static_cast<int>(local_.group->size()) != getSize(); }

  // Whether no collective is under way; in a forked child none is.
  bool is_idle() const { return starter_.is_idle(); }

  const std::string getBackendName() const override { return "shm"; }
  c10::intrusive_ptr<Options> getBackendOptions() override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  bool supportsTensorAlloc(c10::DeviceIndex) override { return true; }
  // Throws OutOfMemoryError where the heap has no room: ordinary memory would do.
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;
  void setSequenceNumberForGroup() override { inner()->setSequenceNumberForGroup(); }
  std::uint64_t getSequenceNumberForGroup() override { return starter_.count(); }
  void abort() override;
  void shutdown() override;

  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using Lists = std::vector<Tensors>;

  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work allreduce_coalesced(Tensors& tensors,
                           const c10d::AllreduceCoalescedOptions& options) override;
  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  Work allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  Work _allgather_base(at::Tensor& output,
                       at::Tensor& input,
                       const c10d::AllgatherOptions& options) override;
  Work allgather_coalesced(Lists& outputs,
                           Tensors& inputs,
                           const c10d::AllgatherOptions& options) override;
  Work allgather_into_tensor_coalesced(Tensors& outputs,
                                       Tensors& inputs,
                                       const c10d::AllgatherOptions& options) override;
  Work reduce_scatter(Tensors& outputs,
                      Lists& inputs,
                      const c10d::ReduceScatterOptions& options) override;
  Work _reduce_scatter_base(at::Tensor& output,
                            at::Tensor& input,
                            const c10d::ReduceScatterOptions& options) override;
  Work reduce_scatter_tensor_coalesced(Tensors& outputs,
                                       Tensors& inputs,
                                       const c10d::ReduceScatterOptions& options) override;
  Work barrier(const c10d::BarrierOptions& options) override;

  Work allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  Work gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  Work scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override;
  Work alltoall_base(at::Tensor& output,
                     at::Tensor& input,
                     std::vector<std::int64_t>& output_splits,
                     std::vector<std::int64_t>& input_splits,
                     const c10d::AllToAllOptions& options) override;
  Work alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  Work send(Tensors& tensors, int to, int tag) override;
  Work recv(Tensors& tensors, int from, int tag) override;
  Work recvAnysource(Tensors& tensors, int tag) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

 private:
  template <typename OpOptions>
  Work hand_on_all_reduce(c10d::OpType type,
                          const Tensors& tensors,
                          const OpOptions& options,
                          HandedCollectives::InPlace<OpOptions> method);
  // Carries out an all_reduce here, which native_ can.
  template <typename OpOptions>
  Work start_all_reduce(c10d::OpType type, const Tensors& tensors, const OpOptions& options);

  const ForkCheck fork_check_;
  const LocalGroup local_;
  Connections connections_;
  shm::Collectives collectives_;
  Starter starter_;
  NativeCollectives native_;
  HandedCollectives handed_;
  PointToPoint messages_;
  const std::chrono::milliseconds patience_;
};

}  // namespace fastddp
