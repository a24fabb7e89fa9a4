#include "shm/collectives/chunks.h"

namespace fastddp::shm {

void Collectives::broadcast(const Operand& operand, int root, Deadline deadline) {
  const std::size_t from = group_.index_of(root);
  const Call call{.kind = Kind::kBroadcast,
                  .element = operand.element,
                  .type = operand.type,
                  .root = static_cast<std::uint32_t>(root),
                  .numel = operand.numel,
                  .operand = place_in_heap(operand.data, operand.bytes())};
  const bool is_root = from == group_.me();
  const std::size_t bytes = operand.bytes();
  char* const data = static_cast<char*>(operand.data);
  group_.begin(call, deadline);
  const Ending ending(group_);
  const bool few = bytes <= kFewBytes;
  if (!few) {
    group_.await_all(group_.advance());
    if (group_.call_of(from).operand != Call::kElsewhere) {
      if (!is_root) copy(data, group_.operand_of(from), bytes);
      const Time step = group_.advance();
      if (is_root) group_.await_all(step);
      return;
    }
  }
  const auto fill = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(bytes, kSlotBytes, i);
    if (is_root) stage(slot, 0, data + range.begin, range.size());
  };
  const auto drain = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(bytes, kSlotBytes, i);
    if (!is_root) copy(data + range.begin, group_.slot(from, slot), range.size());
  };
  go_in_chunks(num_chunks(bytes, kSlotBytes), fill, drain);
}

}  // namespace fastddp::shm
