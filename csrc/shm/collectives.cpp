#include "shm/collectives.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "kernels/stream.h"
#include "shm/error.h"
#include "shm/heap.h"

namespace fastddp::shm {
namespace {

// Up to here, copying costs less than the second wait of the direct path.
constexpr std::size_t kFewBytes = std::size_t{8} << 10;

// Up to this many ranks each reduces whole chunks for itself; above, reading all ranks' slots takes
// longer than the other way's second copy.
constexpr std::size_t kFewRanks = 3;

constexpr std::size_t kCacheLine = 64;

struct Range {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t size() const { return end - begin; }
};

// Part `index` of `count` of the elements. Parts begin at cache lines of a line-aligned operand, so
// no two ranks write to one.
Range part_of(std::size_t numel, std::size_t element_bytes, std::size_t index, std::size_t count) {
  const std::size_t line = kCacheLine / element_bytes;
  const std::size_t lines = (numel + line - 1) / line;
  const auto at = [&](std::size_t i) { return std::min(numel, lines * i / count * line); };
  return {at(index), at(index + 1)};
}

std::size_t num_chunks(std::size_t numel, std::size_t chunk) {
  return numel == 0 ? 1 : (numel + chunk - 1) / chunk;
}

Range chunk_of(std::size_t numel, std::size_t chunk, std::size_t index) {
  return {std::min(numel, index * chunk), std::min(numel, (index + 1) * chunk)};
}

std::uint64_t place_in_heap(const void* data, std::size_t bytes) {
  const Heap& heap = Heap::mine();
  if (!heap.contains(data, bytes)) return Call::kElsewhere;
  return static_cast<std::uint64_t>(static_cast<const char*>(data) - heap.data());
}

void copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

Reduce must_find_reduce(Element element, Reduction reduction) {
  const Reduce reduce = find_reduce(element, reduction);
  if (reduce == nullptr) throw Error("fastddp: there is no such reduction of this dtype");
  return reduce;
}

}  // namespace

void Collectives::barrier(Deadline deadline) {
  group_.begin({.kind = Kind::kBarrier}, deadline);
  group_.await_all(group_.advance());
}

void Collectives::announce(Kind kind, int root, Deadline deadline) {
  begin_elsewhere(kind, root, deadline);
  group_.advance();
  group_.compare_so_far();
}

void Collectives::begin_elsewhere(Kind kind, int root, Deadline deadline) {
  group_.begin({.kind = kind, .root = static_cast<std::uint32_t>(root), .elsewhere = true},
               deadline);
}

std::vector<std::string> Collectives::exchange(const std::string& mine) {
  using Length = std::uint64_t;
  constexpr std::size_t kMost = kSlotBytes - sizeof(Length);
  if (mine.size() > kMost) group_.fail("what the ranks have to compare does not fit into a slot");
  const std::size_t slot = group_.claim_slot();
  const Length length = mine.size();
  copy(group_.slot(group_.me(), slot), &length, sizeof(length));
  copy(group_.slot(group_.me(), slot) + sizeof(length), mine.data(), mine.size());
  group_.await_all(group_.advance());
  group_.check_current();
  std::vector<std::string> all;
  for (std::size_t i = 0; i < group_.size(); ++i) {
    const char* const from = group_.slot(i, slot);
    Length theirs = 0;
    copy(&theirs, from, sizeof(theirs));
    all.emplace_back(from + sizeof(theirs), std::min<std::size_t>(theirs, kMost));
  }
  return all;
}

// Meets the other ranks, unless there are so few bytes that they travel with the first step.
// Returns whether all operands lie in heaps.
bool Collectives::meet(std::size_t bytes) {
  if (bytes <= kFewBytes) return false;
  group_.await_all(group_.advance());
  // One that was stopped meanwhile may not write to ranks that have given up.
  group_.check_current();
  return group_.all_direct();
}

// ---- all_reduce ------------------------------------------------------------------------

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

// Puts data into one of this rank's slots.
void Collectives::stage(std::size_t slot, std::size_t at, const void* from, std::size_t bytes) {
  char* const to = group_.slot(group_.me(), slot) + at;
  if (bytes > kFewBytes) {
    stream_copy(to, from, bytes);
  } else {
    copy(to, from, bytes);
  }
}

// Has every chunk filled into a slot by this rank and, kLag chunks later, drained from all ranks'.
template <typename Fill, typename Drain>
void Collectives::go_in_chunks(std::size_t count, const Fill& fill, const Drain& drain) {
  std::array<std::size_t, kSlots> slots{};
  std::array<Time, kSlots> steps{};
  for (std::size_t i = 0; i < count + kLag; ++i) {
    if (i < count) {
      slots[i % kSlots] = group_.claim_slot();
      fill(i, slots[i % kSlots]);
      steps[i % kSlots] = group_.advance();
    }
    if (i < kLag || i - kLag >= count) continue;
    group_.await_all(steps[(i - kLag) % kSlots]);
    drain(i - kLag, slots[(i - kLag) % kSlots]);
  }
}

// Each rank copies chunks in and reduces them from all ranks' slots for itself.
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

// Each rank copies a chunk in, reduces its share of the chunk before, and copies the one before
// that out, of which every rank has reduced a share by then.
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

// While a piece is on the wire, the piece after it is reduced and the piece before it is copied
// out. Pieces are the same wherever the operands lie: the hosts do not know that of each other.
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
  const std::size_t bytes = size_of(operand.element);
  const std::size_t chunk = kPieceBytes / bytes;
  const std::size_t count = num_chunks(operand.numel, chunk);
  const bool has_lane = group_.me() < lanes;
  const auto piece_in = [&](char* base, bool in_stages, std::size_t i) {
    return base + (in_stages ? i % kStagedPieces : i) * kPieceBytes;
  };
  std::vector<void*> parts(group_.size());
  const auto find_parts = [&](std::size_t i) {  // this rank's share of a piece, on all ranks
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
    // After this all have filled piece i and spread piece i - 2.
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

// ---- broadcast, all_gather, reduce_scatter ---------------------------------------------

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
