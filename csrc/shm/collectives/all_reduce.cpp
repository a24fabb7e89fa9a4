#include <vector>

#include "shm/collectives/chunks.h"

namespace fastddp::shm {

namespace {

// With up to this many ranks, each rank reduces whole chunks for itself. With more, reading the
// slots of all ranks takes longer than the second copy that reducing in shares costs.
constexpr std::size_t kFewRanks = 3;

}  // namespace

void Collectives::all_reduce(const Operand& operand,
                             Reduction reduction,
                             double divisor,
                             Deadline deadline) {
  const Reduce reduce = must_find_reduce(operand.element, reduction);
  const Call call{.kind = Kind::kAllReduce,
                  .element = operand.element,
                  .type = operand.type,
                  .reduction = reduction,
                  .numel = operand.numel,
                  .operand = place_in_heap(operand.data, operand.bytes())};
  group_.begin(call, deadline);
  const Ending ending(group_);
  if (!meet(operand.bytes())) {
    if (group_.size() <= kFewRanks || operand.bytes() <= kFewBytes)
      return reduce_in_chunks(operand, reduce, divisor);
    return reduce_in_shares(operand, reduce, divisor);
  }
  const std::size_t bytes = size_of(operand.element);
  const Range mine = part_of(operand.numel, bytes, group_.me(), group_.size());
  std::vector<void*> parts;
  for (std::size_t i = 0; i < group_.size(); ++i)
    parts.push_back(group_.operand_of(i) + mine.begin * bytes);
  reduce(parts.data(), parts.size(), parts.data(), parts.size(), mine.size(), divisor);
  group_.await_all(group_.advance());
}

// Each rank copies its chunks into slots and reduces all ranks' slots for itself.
void Collectives::reduce_in_chunks(const Operand& operand, Reduce reduce, double divisor) {
  const std::size_t bytes = size_of(operand.element);
  const std::size_t chunk = kSlotBytes / bytes;
  const std::size_t count = num_chunks(operand.numel, chunk);
  char* const data = static_cast<char*>(operand.data);
  std::vector<const void*> sources(group_.size());
  const auto fill = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(operand.numel, chunk, i);
    stage(slot, 0, data + range.begin * bytes, range.size() * bytes);
  };
  const auto drain = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(operand.numel, chunk, i);
    for (std::size_t k = 0; k < group_.size(); ++k) sources[k] = group_.slot(k, slot);
    void* const destination = data + range.begin * bytes;
    sources[group_.me()] = destination;  // the same values
    reduce(&destination, 1, sources.data(), sources.size(), range.size(), divisor);
  };
  go_in_chunks(count, fill, drain);
}

// In each step a rank copies a chunk into a slot, reduces its share of the chunk before, and copies
// out the chunk before that one, of which every rank has reduced its share by then.
void Collectives::reduce_in_shares(const Operand& operand, Reduce reduce, double divisor) {
  const std::size_t bytes = size_of(operand.element);
  const std::size_t chunk = kSlotBytes / bytes;
  const std::size_t count = num_chunks(operand.numel, chunk);
  const std::size_t ranks = group_.size();
  char* const data = static_cast<char*>(operand.data);
  std::vector<const void*> sources(ranks);
  std::vector<std::size_t> slots;
  Time step_before = 0;
  for (std::size_t i = 0; i < count + 2; ++i) {
    if (i < count) {
      const Range range = chunk_of(operand.numel, chunk, i);
      slots.push_back(group_.claim_slot());
      stage(slots[i], 0, data + range.begin * bytes, range.size() * bytes);
    }
    if (i > 0) group_.await_all(step_before);
    if (i > 0 && i <= count) {
      const Range range = chunk_of(operand.numel, chunk, i - 1);
      const Range share = part_of(range.size(), bytes, group_.me(), ranks);
      for (std::size_t k = 0; k < ranks; ++k)
        sources[k] = group_.slot(k, slots[i - 1]) + share.begin * bytes;
      void* const destination = group_.slot(group_.me(), slots[i - 1]) + share.begin * bytes;
      reduce(&destination, 1, sources.data(), ranks, share.size(), divisor);
    }
    if (i > 1) {
      const Range range = chunk_of(operand.numel, chunk, i - 2);
      for (std::size_t k = 0; k < ranks; ++k) {
        const Range share = part_of(range.size(), bytes, k, ranks);
        copy(data + (range.begin + share.begin) * bytes,
             group_.slot(k, slots[i - 2]) + share.begin * bytes, share.size() * bytes);
      }
    }
    step_before = group_.advance();
  }
}

}  // namespace fastddp::shm
