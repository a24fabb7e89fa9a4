#include "backend/native.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "backend/crossing.h"
#include "backend/dtypes.h"
#include "backend/heap_tensor.h"
#include "backend/lane.h"
#include "backend/operands.h"
#include "backend/plain.h"
#include "shm/heap.h"

namespace fastddp {
namespace {

using Tensors = NativeCollectives::Tensors;

bool have_size_and_dtype_of(const at::Tensor& like, const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    return can_move(tensor) && tensor.numel() == like.numel() &&
           tensor.scalar_type() == like.scalar_type();
  });
}

// Whether `whole` holds `count` tensors of the size of `part`.
bool holds(const at::Tensor& whole, const at::Tensor& part, int count) {
  return can_move(whole) && whole.numel() == part.numel() * count &&
         whole.scalar_type() == part.scalar_type();
}

Tensors parts_of(const at::Tensor& whole, int count) {
  Tensors parts;
  const at::Tensor flat = whole.view({-1});
  const std::int64_t numel = flat.numel() / count;
  for (int i = 0; i < count; ++i) parts.push_back(flat.narrow(0, i * numel, numel));
  return parts;
}

}  // namespace

NativeCollectives::NativeCollectives(int rank,
                                     int size,
                                     const Connections& connections,
                                     shm::Group& group,
                                     shm::Collectives& collectives)
    : rank_(rank),
      size_(size),
      connections_(connections),
      group_(group),
      collectives_(collectives) {}

// ---- barrier, all_reduce ---------------------------------------------------------------

void NativeCollectives::barrier(shm::Deadline deadline) { collectives_.barrier(deadline); }

bool NativeCollectives::can_all_reduce(const Tensors& tensors, const c10d::ReduceOp& op) const {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    // A lane can carry what gloo can.
    return can_reduce(tensor, op) && !(spans_hosts() && tensor.scalar_type() == at::kShort);
  });
}

void NativeCollectives::all_reduce(const Tensors& tensors,
                                   const c10d::ReduceOp& op,
                                   shm::Deadline deadline) {
  for (const at::Tensor& tensor : tensors) all_reduce(tensor, op, deadline);
}

void NativeCollectives::all_reduce(const at::Tensor& tensor,
                                   const c10d::ReduceOp& op,
                                   shm::Deadline deadline) {
  const at::Tensor packed = to_read(tensor);
  const shm::Operand operand = operand_of(as_real(packed, op), tensor.scalar_type());
  const Reduction reduction = *reduction_of(op);
  if (spans_hosts()) {
    all_reduce_across(operand, reduction, deadline);
  } else {
    collectives_.all_reduce(operand, reduction, size_, deadline);
  }
  if (!packed.is_same(tensor)) tensor.copy_(packed);
}

void NativeCollectives::all_reduce_across(const shm::Operand& operand,
                                          Reduction reduction,
                                          shm::Deadline deadline) {
  void* staging = nullptr;
  if (!shm::Heap::mine().contains(operand.data, operand.bytes())) {
    if (!staging_.defined())
      staging_ = heap_tensor(rank_, shm::kStagedPieces * shm::kPieceBytes, at::kByte);
    staging = staging_.data_ptr();
  }
  const Lanes& lanes = connections_.lanes();
  Crossing crossing({lanes, group_, deadline}, group_, operand.element, reduction);
  collectives_.all_reduce_across(operand, reduction, size_, static_cast<std::size_t>(lanes.count),
                                 crossing, staging, deadline);
}

// ---- broadcast, all_gather -------------------------------------------------------------

bool NativeCollectives::can_broadcast(const Tensors& tensors) const {
  return tensors.size() == 1 && can_move(tensors[0]) && !spans_hosts();
}

void NativeCollectives::broadcast(const at::Tensor& tensor, int root, shm::Deadline deadline) {
  const at::Tensor packed = to_read(tensor);
  collectives_.broadcast(operand_of(packed), root, deadline);
  if (!packed.is_same(tensor) && root != rank_) tensor.copy_(packed);
}

bool NativeCollectives::can_all_gather(const Lists& outputs, const Tensors& inputs) const {
  return inputs.size() == 1 && outputs.size() == 1 && !spans_hosts() && can_move(inputs[0]) &&
         outputs[0].size() == static_cast<std::size_t>(size_) &&
         have_size_and_dtype_of(inputs[0], outputs[0]);
}

void NativeCollectives::all_gather(const Tensors& outputs,
                                   const at::Tensor& input,
                                   shm::Deadline deadline) {
  const at::Tensor packed = to_read(input);
  Stand stand;
  std::vector<void*> addresses;
  for (const at::Tensor& output : stand.write(outputs)) addresses.push_back(output.data_ptr());
  collectives_.all_gather(operand_of(packed), addresses, deadline);
  stand.give_back();
}

bool NativeCollectives::can_all_gather_whole(const Tensors& outputs, const Tensors& inputs) const {
  if (spans_hosts() || outputs.size() != inputs.size()) return false;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!can_move(inputs[i]) || !holds(outputs[i], inputs[i], size_)) return false;
  }
  return true;
}

void NativeCollectives::all_gather_whole(const Tensors& outputs,
                                         const Tensors& inputs,
                                         shm::Deadline deadline) {
  Stand stand;
  for (std::size_t i = 0; i < inputs.size(); ++i)
    all_gather(parts_of(stand.write(outputs[i]), size_), inputs[i], deadline);
  stand.give_back();
}

// ---- reduce_scatter --------------------------------------------------------------------

bool NativeCollectives::can_reduce_scatter(const Tensors& outputs,
                                           const Lists& inputs,
                                           const c10d::ReduceOp& op) const {
  return outputs.size() == 1 && inputs.size() == 1 && !spans_hosts() &&
         can_reduce(outputs[0], op) && inputs[0].size() == static_cast<std::size_t>(size_) &&
         have_size_and_dtype_of(outputs[0], inputs[0]);
}

void NativeCollectives::reduce_scatter(const at::Tensor& output,
                                       const Tensors& inputs,
                                       const c10d::ReduceOp& op,
                                       shm::Deadline deadline) {
  reduce_scatter(output, inputs, {}, op, deadline);
}

void NativeCollectives::reduce_scatter(const at::Tensor& output,
                                       const Tensors& inputs,
                                       const at::Tensor& block,
                                       const c10d::ReduceOp& op,
                                       shm::Deadline deadline) {
  Stand stand;
  const at::Tensor packed = stand.write(output);
  const Tensors packed_inputs = stand.read(inputs);
  std::vector<void*> addresses;
  for (const at::Tensor& input : packed_inputs) addresses.push_back(input.data_ptr());
  collectives_.reduce_scatter(operand_of(as_real(packed, op), output.scalar_type()), addresses,
                              block.defined() ? block.const_data_ptr() : nullptr, *reduction_of(op),
                              size_, deadline);
  stand.give_back();
}

bool NativeCollectives::can_reduce_scatter_whole(const Tensors& outputs,
                                                 const Tensors& inputs,
                                                 const c10d::ReduceOp& op) const {
  if (spans_hosts() || outputs.size() != inputs.size()) return false;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!can_reduce(outputs[i], op) || !holds(inputs[i], outputs[i], size_)) return false;
  }
  return true;
}

void NativeCollectives::reduce_scatter_whole(const Tensors& outputs,
                                             const Tensors& inputs,
                                             const c10d::ReduceOp& op,
                                             shm::Deadline deadline) {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor block = to_read(inputs[i]);
    reduce_scatter(outputs[i], parts_of(block, size_), block, op, deadline);
  }
}

}  // namespace fastddp
