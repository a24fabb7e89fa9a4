#include <cstring>

#include "shm/collectives/chunks.h"

namespace fastddp::shm {

void Collectives::all_gather(const Operand& input,
                             std::span<void* const> outputs,
                             Deadline deadline) {
  const std::size_t bytes = input.bytes();
  const Call call{.kind = Kind::kAllGather,
                  .element = input.element,
                  .type = input.type,
                  .numel = input.numel,
                  .operand = place_in_heap(input.data, bytes)};
  group_.begin(call, deadline);
  const Ending ending(group_);
  const std::size_t ranks = group_.size();
  const auto* const data = static_cast<const char*>(input.data);
  const auto output = [&](std::size_t k, std::size_t offset) {
    return static_cast<char*>(outputs[static_cast<std::size_t>(group_.rank(k))]) + offset;
  };
  if (bytes > 0 && output(group_.me(), 0) != data)
    std::memmove(output(group_.me(), 0), data, bytes);
  if (meet(bytes)) {
    for (std::size_t k = 0; k < ranks; ++k) {
      if (k != group_.me()) copy(output(k, 0), group_.operand_of(k), bytes);
    }
    group_.await_all(group_.advance());
    return;
  }
  const auto fill = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(bytes, kSlotBytes, i);
    stage(slot, 0, output(group_.me(), range.begin), range.size());
  };
  const auto drain = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(bytes, kSlotBytes, i);
    for (std::size_t k = 0; k < ranks; ++k) {
      if (k != group_.me()) copy(output(k, range.begin), group_.slot(k, slot), range.size());
    }
  };
  go_in_chunks(num_chunks(bytes, kSlotBytes), fill, drain);
}

}  // namespace fastddp::shm
