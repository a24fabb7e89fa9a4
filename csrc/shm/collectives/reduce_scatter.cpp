#include <vector>

#include "shm/collectives/chunks.h"

namespace fastddp::shm {

void Collectives::reduce_scatter(const Operand& output,
                                 std::span<void* const> inputs,
                                 const void* block,
                                 Reduction reduction,
                                 double divisor,
                                 Deadline deadline) {
  const Reduce reduce = must_find_reduce(output.element, reduction);
  const std::size_t bytes = output.bytes();
  const std::size_t ranks = group_.size();
  const Call call{
      .kind = Kind::kReduceScatter,
      .element = output.element,
      .type = output.type,
      .reduction = reduction,
      .numel = output.numel,
      .operand = block == nullptr ? Call::kElsewhere : place_in_heap(block, bytes * ranks)};
  group_.begin(call, deadline);
  const Ending ending(group_);
  std::vector<const void*> sources(ranks);
  char* const data = static_cast<char*>(output.data);
  void* destination = data;
  const auto me = static_cast<std::size_t>(group_.rank(group_.me()));
  if (meet(bytes)) {
    for (std::size_t k = 0; k < ranks; ++k) sources[k] = group_.operand_of(k) + me * bytes;
    reduce(&destination, 1, sources.data(), ranks, output.numel, divisor);
    group_.await_all(group_.advance());
    return;
  }
  const std::size_t element = size_of(output.element);
  const std::size_t part = kSlotBytes / ranks / kCacheLine * kCacheLine;  // of a slot, by receiver
  const std::size_t chunk = part / element;
  const auto fill = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(output.numel, chunk, i);
    for (std::size_t k = 0; k < ranks; ++k) {
      stage(slot, k * part, static_cast<const char*>(inputs[k]) + range.begin * element,
            range.size() * element);
    }
  };
  const auto drain = [&](std::size_t i, std::size_t slot) {
    const Range range = chunk_of(output.numel, chunk, i);
    for (std::size_t k = 0; k < ranks; ++k) sources[k] = group_.slot(k, slot) + me * part;
    destination = data + range.begin * element;
    reduce(&destination, 1, sources.data(), ranks, range.size(), divisor);
  };
  go_in_chunks(num_chunks(output.numel, chunk), fill, drain);
}

}  // namespace fastddp::shm
