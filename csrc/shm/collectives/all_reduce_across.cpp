#include <vector>

#include "shm/collectives/chunks.h"

namespace fastddp::shm {

// While a piece is on the wire, the piece after it is reduced and the piece before it is copied
// out. Pieces are the same wherever the operands lie, because hosts do not know where the operands
// of other hosts lie.
void Collectives::all_reduce_across(const Operand& operand,
                                    Reduction reduction,
                                    double divisor,
                                    std::size_t lanes,
                                    CrossHosts& cross,
                                    void* staging,
                                    Deadline deadline) {
  // The average is a sum until all hosts are in it.
  const bool is_average = reduction == Reduction::kAvg;
  const Reduce reduce = must_find_reduce(operand.element, is_average ? Reduction::kSum : reduction);
  const Reduce spread = must_find_reduce(operand.element, reduction);
  const bool staged = staging != nullptr;
  const Call call{.kind = Kind::kAllReduce,
                  .element = operand.element,
                  .type = operand.type,
                  .reduction = reduction,
                  .numel = operand.numel,
                  .operand = staged ? place_in_heap(staging, kStagedPieces * kPieceBytes)
                                    : place_in_heap(operand.data, operand.bytes()),
                  .staged = staged,
                  .across = true};
  group_.begin(call, deadline);
  const Ending ending(group_);
  const std::size_t bytes = size_of(operand.element);
  const std::size_t chunk = kPieceBytes / bytes;
  const std::size_t count = num_chunks(operand.numel, chunk);
  const bool has_lane = group_.me() < lanes;
  const auto piece_in = [&](char* base, bool in_stages, std::size_t i) {
    return base + (in_stages ? i % kStagedPieces : i) * kPieceBytes;
  };
  std::vector<void*> parts(group_.size());
  const auto find_parts = [&](std::size_t i) {  // this rank's share of piece i, on all ranks
    const std::size_t numel = chunk_of(operand.numel, chunk, i).size();
    const Range share = part_of(numel, bytes, group_.me(), lanes);
    for (std::size_t k = 0; k < parts.size(); ++k)
      parts[k] = piece_in(group_.operand_of(k), group_.call_of(k).staged, i) + share.begin * bytes;
    return share.size();
  };
  const auto copy_piece = [&](std::size_t i, bool out) {
    char* const data = piece_in(static_cast<char*>(operand.data), false, i);
    char* const stage = piece_in(static_cast<char*>(staging), true, i);
    const std::size_t size = chunk_of(operand.numel, chunk, i).size() * bytes;
    copy(out ? data : stage, out ? stage : data, size);
  };
  for (std::size_t i = 0; i < count + 2; ++i) {
    if (i < count && staged) copy_piece(i, false);
    // After this, all ranks have filled piece i and spread piece i - 2.
    if (i < count || i > 1) group_.await_all(group_.advance());
    group_.check_current();  // as in meet()
    if (i > 1 && staged) copy_piece(i - 2, true);
    if (i == 0 && has_lane) cross.compare(group_.call_of(group_.me()));
    if (i < count && has_lane) {
      const std::size_t numel = find_parts(i);
      void* const own = parts[group_.me()];
      reduce(&own, 1, parts.data(), parts.size(), numel, divisor);
      cross.start(own, numel);
    }
    if (i > 0 && i <= count && has_lane) {
      cross.finish();
      const std::size_t numel = find_parts(i - 1);
      const void* const source = parts[group_.me()];
      spread(parts.data(), parts.size(), &source, 1, numel, divisor);
    }
  }
}

}  // namespace fastddp::shm
