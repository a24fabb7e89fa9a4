// The c10d backend `shm`: collectives through shared memory where they are hot and the ranks share
// a host, and through another backend otherwise.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/handed_work.h"
#include "backend/particulars.h"
#include "backend/turns.h"
#include "kernels/reduce.h"
#include "shm/collectives.h"
#include "shm/group.h"
#include "shm/messages.h"
#include "shm/segment.h"

namespace fastddp {

// The ranks of a group on this host, once they have found each other.
struct LocalRanks {
  std::vector<int> ranks;           // of the group, ascending
  std::vector<shm::Address> heaps;  // theirs
  shm::Address control;             // the segment that they share
};

// Where a group spans hosts: how parts of an all-reduce cross.
struct Lanes {
  std::int64_t count = 0;                     // ranks per host that exchange parts
  std::vector<int> ranks;                     // those with this one's place; empty if it has none
  c10::intrusive_ptr<c10d::Backend> backend;  // theirs; null if it has none
};

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
  static shm::Segment make_control(std::size_t ranks);

  // For a group that spans hosts; before the first collective.
  void set_lanes(Lanes lanes) { lanes_ = std::move(lanes); }

  const c10::intrusive_ptr<c10d::Backend>& inner() const { return inner_; }
  bool spans_hosts() const { return static_cast<int>(group_->size()) != getSize(); }

  // Whether no collective is under way; in a forked child none is.
  bool is_idle() const;

  const std::string getBackendName() const override { return "shm"; }
  c10::intrusive_ptr<Options> getBackendOptions() override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  bool supportsTensorAlloc(c10::DeviceIndex) override { return true; }
  // Throws OutOfMemoryError where the heap has no room: ordinary memory would do.
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  std::uint64_t getSequenceNumberForGroup() override {
    return launched_.load(std::memory_order_relaxed);
  }
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
  using Body = std::function<void(shm::Deadline)>;

  // Runs or submits one collective of ours, as its launcher waits for it or not.
  Work start(c10d::OpType type,
             const char* title,
             Tensors results,
             std::chrono::milliseconds timeout,
             bool async,
             Body body);
  // A collective that the inner backend carries out.
  struct Handed {
    c10d::OpType type;
    const char* title;
    shm::Kind kind;
    Tensors results;  // all that it writes to
    Particulars what;
    std::int64_t root = 0;
  };
  template <typename OpOptions>
  using InPlace = Work (c10d::Backend::*)(Tensors&, const OpOptions&);
  template <typename Outputs, typename Inputs, typename OpOptions>
  using Moving = Work (c10d::Backend::*)(Outputs&, Inputs&, const OpOptions&);

  template <typename OpOptions, typename Launch>
  Work hand_on(Handed call, const OpOptions& options, Launch launch);
  template <typename OpOptions>
  Work hand_on(Handed call, const OpOptions& options, InPlace<OpOptions> method);
  template <typename Outputs, typename Inputs, typename OpOptions>
  Work hand_on(Handed call,
               const Outputs& outputs,
               const Inputs& inputs,
               const OpOptions& options,
               Moving<Outputs, Inputs, OpOptions> method);
  template <typename OpOptions>
  Work hand_on_all_reduce(c10d::OpType type,
                          const Tensors& tensors,
                          const OpOptions& options,
                          InPlace<OpOptions> method);
  void compare(const Handed& call, shm::Deadline deadline);
  std::vector<std::string> exchange_across(const std::string& mine, shm::Deadline deadline);
  template <typename Launch>
  Work launch_together(const Launch& launch, shm::Deadline deadline);
  void wait_for(const Work& work, shm::Deadline deadline);
  void tell_other_hosts();
  void close_connections();
  template <typename Launch>
  Work message(shm::End end, const Tensors& tensors, int peer, int tag, const Launch& launch);
  void announce(shm::Kind kind);
  [[noreturn]] void refuse(const std::string& why);
  void refuse_overlaps(const char* title, const Tensors& written);
  bool can_all_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op) const;
  void all_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op, shm::Deadline deadline);
  void all_reduce_across(const shm::Operand& operand, Reduction reduction, shm::Deadline deadline);
  void all_gather(const Tensors& outputs, const at::Tensor& input, shm::Deadline deadline);
  void reduce_scatter(const at::Tensor& output,
                      const Tensors& inputs,
                      const at::Tensor& block,
                      const c10d::ReduceOp& op,
                      shm::Deadline deadline);
  void check_usable() const;
  std::chrono::milliseconds timeout() const;

  c10::intrusive_ptr<c10d::Backend> inner_;
  // With the memory behind it, since works outlive this.
  std::shared_ptr<shm::Group> group_;
  std::unique_ptr<shm::Collectives> collectives_;
  std::mutex messages_mutex_;
  std::optional<shm::Messages> messages_;
  Lanes lanes_;
  at::Tensor staging_;  // for what has to be in the heap to cross hosts
  std::shared_ptr<Turns> turns_ = std::make_shared<Turns>();
  std::atomic<bool> has_left_{false};
  std::atomic<std::uint64_t> launched_{0};
  const std::chrono::milliseconds patience_;
  const unsigned forks_;
};

}  // namespace fastddp
