#include <Python.h>  // first, says its manual

#include "backend/shm_backend.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "backend/heap_tensor.h"
#include "backend/particulars.h"
#include "backend/released_gil.h"
#include "backend/splits.h"
#include "tensor/error_text.h"

namespace fastddp {
namespace {

using c10d::OpType;

// How long a rank that leaves lets collectives under way go on.
constexpr auto kPatience = std::chrono::milliseconds(5000);

std::vector<at::Tensor> flat(const std::vector<std::vector<at::Tensor>>& lists) {
  std::vector<at::Tensor> all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

std::string with_root(const std::string& name, std::int64_t root) {
  return name + " with root " + std::to_string(root) + " ";
}

}  // namespace

// ---- life ------------------------------------------------------------------------------

ShmBackend::ShmBackend(int rank,
                       int size,
                       c10::intrusive_ptr<c10d::Backend> inner,
                       const LocalRanks& local,
                       std::chrono::milliseconds patience)
    : Backend(rank, size),
      local_(LocalGroup::open(rank, local)),
      connections_(rank, size, std::move(inner)),
      collectives_(*local_.group),
      starter_(rank, size, connections_, *local_.group, collectives_),
      native_(rank, size, connections_, *local_.group, collectives_),
      handed_(rank, size, starter_, connections_, local_.group, collectives_),
      messages_(rank, starter_, connections_, local_),
      patience_(std::min(patience, kPatience)) {}

ShmBackend::~ShmBackend() {
  if (fork_check_.is_forked()) {
    // The parent's: neither its thread nor its sockets' threads are here.
    connections_.leak();
    starter_.leak();
    return;
  }
  shutdown();
  const ReleasedGil without_gil;
  connections_.drop();
}

void ShmBackend::shutdown() {
  if (fork_check_.is_forked()) return;  // the parent goes on
  const ReleasedGil without_gil;
  starter_.leave(patience_);
}

void ShmBackend::abort() {
  starter_.check_usable();
  local_.group->abort("rank " + std::to_string(getRank()) + " has aborted the group");
  inner()->abort();
}

c10::intrusive_ptr<c10d::Backend::Options> ShmBackend::getBackendOptions() {
  return c10::make_intrusive<Options>("shm", connections_.timeout());
}

void ShmBackend::setTimeout(std::chrono::milliseconds timeout) {
  inner()->setTimeout(timeout);  // what goes through a lane is given its timeout each time
}

at::Tensor ShmBackend::allocateTensor(long size, at::TensorOptions options) {
  return heap_tensor(getRank(), size, options);
}

// ---- all_reduce, reduce ----------------------------------------------------------------

template <typename OpOptions>
ShmBackend::Work ShmBackend::hand_on_all_reduce(OpType type,
                                                const Tensors& tensors,
                                                const OpOptions& options,
                                                HandedCollectives::InPlace<OpOptions> method) {
  const std::string what =
      "all_reduce " + text_of_sizes(tensors) + ", " + name_of(options.reduceOp);
  return handed_.start({type, "shm:all_reduce", shm::Kind::kAllReduce, tensors, {what}}, options,
                       method);
}

template <typename OpOptions>
ShmBackend::Work ShmBackend::start_all_reduce(OpType type,
                                              const Tensors& tensors,
                                              const OpOptions& options) {
  starter_.refuse_overlaps("all_reduce", tensors);
  return starter_.start({type, "shm:all_reduce", tensors, options.timeout, options.asyncOp},
                        [this, tensors, op = options.reduceOp](shm::Deadline deadline) {
                          native_.all_reduce(tensors, op, deadline);
                        });
}

ShmBackend::Work ShmBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  if (tensors.size() != 1 || !native_.can_all_reduce(tensors, options.reduceOp))
    return hand_on_all_reduce(OpType::ALLREDUCE, tensors, options, &Backend::allreduce);
  return start_all_reduce(OpType::ALLREDUCE, tensors, options);
}

ShmBackend::Work ShmBackend::allreduce_coalesced(Tensors& tensors,
                                                 const c10d::AllreduceCoalescedOptions& options) {
  if (!native_.can_all_reduce(tensors, options.reduceOp)) {
    return hand_on_all_reduce(OpType::ALLREDUCE_COALESCED, tensors, options,
                              &Backend::allreduce_coalesced);
  }
  return start_all_reduce(OpType::ALLREDUCE_COALESCED, tensors, options);
}

ShmBackend::Work ShmBackend::allreduce_sparse(Tensors& tensors,
                                              const c10d::AllreduceOptions& options) {
  return hand_on_all_reduce(OpType::_ALLREDUCE_SPARSE, tensors, options,
                            &Backend::allreduce_sparse);
}

ShmBackend::Work ShmBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  return handed_.start({OpType::REDUCE,
                        "shm:reduce",
                        shm::Kind::kReduce,
                        tensors,
                        {with_root("reduce", options.rootRank) + text_of_sizes(tensors) + ", " +
                         name_of(options.reduceOp)},
                        options.rootRank},
                       options, &Backend::reduce);
}

// ---- broadcast, scatter ----------------------------------------------------------------

ShmBackend::Work ShmBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const int root = static_cast<int>(options.rootRank);
  if (!native_.can_broadcast(tensors)) {
    return handed_.start({OpType::BROADCAST,
                          "shm:broadcast",
                          shm::Kind::kBroadcast,
                          tensors,
                          {with_root("broadcast", root) + text_of_sizes(tensors)},
                          root},
                         options, &Backend::broadcast);
  }
  if (root < 0 || root >= getSize())
    starter_.refuse(c10::str("broadcast from rank ", root, " in a group of ", getSize()));
  // The root's is only read, but nobody knows yet whether the ranks agree on the root.
  starter_.refuse_overlaps("broadcast", tensors);
  return starter_.start(
      {OpType::BROADCAST, "shm:broadcast", tensors, options.timeout, options.asyncOp},
      [this, tensor = tensors[0], root](shm::Deadline deadline) {
        native_.broadcast(tensor, root, deadline);
      });
}

ShmBackend::Work ShmBackend::scatter(Tensors& outputs,
                                     Lists& inputs,
                                     const c10d::ScatterOptions& options) {
  return handed_.start({OpType::SCATTER,
                        "shm:scatter",
                        shm::Kind::kScatter,
                        outputs,
                        {with_root("scatter", options.rootRank) + text_of_sizes(outputs)},
                        options.rootRank},
                       outputs, inputs, options, &Backend::scatter);
}

// ---- all_gather, gather ----------------------------------------------------------------

ShmBackend::Work ShmBackend::allgather(Lists& outputs,
                                       Tensors& inputs,
                                       const c10d::AllgatherOptions& options) {
  if (!native_.can_all_gather(outputs, inputs)) {
    return handed_.start({OpType::ALLGATHER,
                          "shm:all_gather",
                          shm::Kind::kAllGather,
                          flat(outputs),
                          {"all_gather " + text_of_sizes(inputs)}},
                         outputs, inputs, options, &Backend::allgather);
  }
  starter_.refuse_overlaps("all_gather", outputs[0]);
  return starter_.start(
      {OpType::ALLGATHER, "shm:all_gather", outputs[0], options.timeout, options.asyncOp},
      [this, outputs = outputs[0], input = inputs[0]](shm::Deadline deadline) {
        native_.all_gather(outputs, input, deadline);
      });
}

ShmBackend::Work ShmBackend::_allgather_base(at::Tensor& output,
                                             at::Tensor& input,
                                             const c10d::AllgatherOptions& options) {
  Tensors outputs{output};
  Tensors inputs{input};
  return allgather_into_tensor_coalesced(outputs, inputs, options);
}

ShmBackend::Work ShmBackend::allgather_coalesced(Lists& outputs,
                                                 Tensors& inputs,
                                                 const c10d::AllgatherOptions& options) {
  return handed_.start({OpType::ALLGATHER_COALESCED,
                        "shm:all_gather",
                        shm::Kind::kAllGather,
                        flat(outputs),
                        {"all_gather " + text_of_sizes(inputs)}},
                       outputs, inputs, options, &Backend::allgather_coalesced);
}

ShmBackend::Work ShmBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  if (!native_.can_all_gather_whole(outputs, inputs)) {
    HandedCall call{OpType::_ALLGATHER_BASE,
                    "shm:all_gather",
                    shm::Kind::kAllGather,
                    outputs,
                    {"all_gather " + text_of_sizes(inputs)}};
    return inputs.size() == 1 && outputs.size() == 1
               ? handed_.start(std::move(call), outputs[0], inputs[0], options,
                               &Backend::_allgather_base)
               : handed_.start(std::move(call), outputs, inputs, options,
                               &Backend::allgather_into_tensor_coalesced);
  }
  starter_.refuse_overlaps("all_gather", outputs);
  return starter_.start(
      {OpType::_ALLGATHER_BASE, "shm:all_gather", outputs, options.timeout, options.asyncOp},
      [this, outputs, inputs](shm::Deadline deadline) {
        native_.all_gather_whole(outputs, inputs, deadline);
      });
}

ShmBackend::Work ShmBackend::gather(Lists& outputs,
                                    Tensors& inputs,
                                    const c10d::GatherOptions& options) {
  return handed_.start({OpType::GATHER,
                        "shm:gather",
                        shm::Kind::kGather,
                        flat(outputs),
                        {with_root("gather", options.rootRank) + text_of_sizes(inputs)},
                        options.rootRank},
                       outputs, inputs, options, &Backend::gather);
}

// ---- reduce_scatter --------------------------------------------------------------------

ShmBackend::Work ShmBackend::reduce_scatter(Tensors& outputs,
                                            Lists& inputs,
                                            const c10d::ReduceScatterOptions& options) {
  if (!native_.can_reduce_scatter(outputs, inputs, options.reduceOp)) {
    // Ranks may take parts of different sizes, but each gives such a part to each.
    return handed_.start(
        {OpType::REDUCE_SCATTER,
         "shm:reduce_scatter",
         shm::Kind::kReduceScatter,
         outputs,
         {"reduce_scatter " + text_of_sizes(flat(inputs)) + ", " + name_of(options.reduceOp)}},
        outputs, inputs, options, &Backend::reduce_scatter);
  }
  starter_.refuse_overlaps("reduce_scatter", outputs);
  return starter_.start(
      {OpType::REDUCE_SCATTER, "shm:reduce_scatter", outputs, options.timeout, options.asyncOp},
      [this, output = outputs[0], inputs = inputs[0], op = options.reduceOp](
          shm::Deadline deadline) { native_.reduce_scatter(output, inputs, op, deadline); });
}

ShmBackend::Work ShmBackend::_reduce_scatter_base(at::Tensor& output,
                                                  at::Tensor& input,
                                                  const c10d::ReduceScatterOptions& options) {
  Tensors outputs{output};
  Tensors inputs{input};
  return reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

ShmBackend::Work ShmBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  if (!native_.can_reduce_scatter_whole(outputs, inputs, options.reduceOp)) {
    HandedCall call{OpType::_REDUCE_SCATTER_BASE,
                    "shm:reduce_scatter",
                    shm::Kind::kReduceScatter,
                    outputs,
                    {"reduce_scatter " + text_of_sizes(inputs) + ", " + name_of(options.reduceOp)}};
    return inputs.size() == 1 && outputs.size() == 1
               ? handed_.start(std::move(call), outputs[0], inputs[0], options,
                               &Backend::_reduce_scatter_base)
               : handed_.start(std::move(call), outputs, inputs, options,
                               &Backend::reduce_scatter_tensor_coalesced);
  }
  starter_.refuse_overlaps("reduce_scatter", outputs);
  return starter_.start({OpType::_REDUCE_SCATTER_BASE, "shm:reduce_scatter", outputs,
                         options.timeout, options.asyncOp},
                        [this, outputs, inputs, op = options.reduceOp](shm::Deadline deadline) {
                          native_.reduce_scatter_whole(outputs, inputs, op, deadline);
                        });
}

// ---- all_to_all ------------------------------------------------------------------------

ShmBackend::Work ShmBackend::alltoall_base(at::Tensor& output,
                                           at::Tensor& input,
                                           std::vector<std::int64_t>& output_splits,
                                           std::vector<std::int64_t>& input_splits,
                                           const c10d::AllToAllOptions& options) {
  try {
    check_splits(output, output_splits, getSize());
    check_splits(input, input_splits, getSize());
  } catch (const c10::Error& error) {
    starter_.refuse(text_of(error));
  }
  Particulars what{"all_to_all of " + name_of(input.scalar_type())};
  what.gives = elements_of_splits(input, input_splits, getSize());
  what.takes = elements_of_splits(output, output_splits, getSize());
  return handed_.start(
      {OpType::ALLTOALL_BASE, "shm:all_to_all", shm::Kind::kAllToAll, {output}, what}, options,
      [this, output, input, output_splits, input_splits, options](Stand& stand) {
        at::Tensor plain = stand.read(input);
        at::Tensor plain_output = stand.write(output);
        auto to = input_splits, from = output_splits;
        return inner()->alltoall_base(plain_output, plain, from, to, options);
      });
}

ShmBackend::Work ShmBackend::alltoall(Tensors& outputs,
                                      Tensors& inputs,
                                      const c10d::AllToAllOptions& options) {
  Particulars what{"all_to_all of " + names_of_dtypes(inputs)};
  for (const at::Tensor& input : inputs) what.gives.push_back(input.numel());
  for (const at::Tensor& output : outputs) what.takes.push_back(output.numel());
  return handed_.start({OpType::ALLTOALL, "shm:all_to_all", shm::Kind::kAllToAll, outputs, what},
                       outputs, inputs, options, &Backend::alltoall);
}

// ---- barriers --------------------------------------------------------------------------

ShmBackend::Work ShmBackend::barrier(const c10d::BarrierOptions& options) {
  if (!native_.can_barrier()) {
    return handed_.start({OpType::BARRIER, "shm:barrier", shm::Kind::kBarrier, {}, {"barrier"}},
                         options, [this, options](Stand&) { return inner()->barrier(options); });
  }
  return starter_.start({OpType::BARRIER, "shm:barrier", {}, options.timeout, options.asyncOp},
                        [this](shm::Deadline deadline) { native_.barrier(deadline); });
}

// It compares for itself, and names who is missing.
void ShmBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  starter_.announce(shm::Kind::kMonitoredBarrier);
  inner()->monitoredBarrier(options, wait_all_ranks);
}

// ---- messages --------------------------------------------------------------------------

ShmBackend::Work ShmBackend::send(Tensors& tensors, int to, int tag) {
  return messages_.send(tensors, to, tag);
}

ShmBackend::Work ShmBackend::recv(Tensors& tensors, int from, int tag) {
  return messages_.receive(tensors, from, tag);
}

ShmBackend::Work ShmBackend::recvAnysource(Tensors& tensors, int tag) {
  return messages_.receive_from_any(tensors, tag);
}

}  // namespace fastddp
