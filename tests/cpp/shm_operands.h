// Operands of collectives for tests, in the heap or elsewhere, and the expected results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "kernels/reduce.h"
#include "shm_ranks.h"

namespace operands {

using fastddp::Element;
using fastddp::Reduction;
using ranks::Rank;

struct Case {
  Element element;
  Reduction reduction;
};

// The kernels have their own tests. These cases move each width of element, and cover each way in
// which a result can depend on the ranks.
inline constexpr Case kCases[] = {
    {Element::kFloat32, Reduction::kSum},  {Element::kFloat64, Reduction::kSum},
    {Element::kBFloat16, Reduction::kAvg}, {Element::kFloat16, Reduction::kSum},
    {Element::kInt8, Reduction::kMax},     {Element::kUInt8, Reduction::kSum},
    {Element::kInt16, Reduction::kMin},    {Element::kInt32, Reduction::kBxor},
    {Element::kInt64, Reduction::kSum},    {Element::kFloat32, Reduction::kAvg},
};

template <typename T>
void store_as(char* data, std::size_t i, T value) {
  std::memcpy(data + i * sizeof(T), &value, sizeof(T));
}

template <typename T>
T load_as(const char* data, std::size_t i) {
  T value;
  std::memcpy(&value, data + i * sizeof(T), sizeof(T));
  return value;
}

inline void store(Element element, char* data, std::size_t i, double value) {
  switch (element) {
    case Element::kFloat32:
      return store_as(data, i, static_cast<float>(value));
    case Element::kFloat64:
      return store_as(data, i, value);
    case Element::kFloat16:
      return store_as(data, i, fastddp::to_float16(static_cast<float>(value)));
    case Element::kBFloat16:
      return store_as(data, i, fastddp::to_bfloat16(static_cast<float>(value)));
    case Element::kInt8:
      return store_as(data, i, static_cast<std::int8_t>(value));
    case Element::kUInt8:
    case Element::kBool:
      return store_as(data, i, static_cast<std::uint8_t>(value));
    case Element::kInt16:
      return store_as(data, i, static_cast<std::int16_t>(value));
    case Element::kInt32:
      return store_as(data, i, static_cast<std::int32_t>(value));
    case Element::kInt64:
      return store_as(data, i, static_cast<std::int64_t>(value));
  }
}

inline double load(Element element, const char* data, std::size_t i) {
  switch (element) {
    case Element::kFloat32:
      return load_as<float>(data, i);
    case Element::kFloat64:
      return load_as<double>(data, i);
    case Element::kFloat16:
      return fastddp::to_float(load_as<fastddp::Float16>(data, i));
    case Element::kBFloat16:
      return fastddp::to_float(load_as<fastddp::BFloat16>(data, i));
    case Element::kInt8:
      return load_as<std::int8_t>(data, i);
    case Element::kUInt8:
    case Element::kBool:
      return load_as<std::uint8_t>(data, i);
    case Element::kInt16:
      return load_as<std::int16_t>(data, i);
    case Element::kInt32:
      return load_as<std::int32_t>(data, i);
    case Element::kInt64:
      return static_cast<double>(load_as<std::int64_t>(data, i));
  }
  return 0;
}

// Memory of one operand, at an address that is a multiple of the element's size and no more, with
// guards on both sides.
class Buffer {
 public:
  Buffer(bool in_heap, Element element, std::size_t numel)
      : element_(element), numel_(numel), bytes_(numel * fastddp::size_of(element)) {
    const std::size_t whole = bytes_ + 2 * kGuard;
    if (in_heap) {
      block_ = static_cast<char*>(fastddp::shm::Heap::mine().allocate(whole));
    } else {
      ordinary_.resize(whole);
      block_ = ordinary_.data();
    }
    std::memset(block_, kMark, whole);
    data_ = block_ + kGuard / 2 + fastddp::size_of(element);
  }

  ~Buffer() {
    if (ordinary_.empty()) fastddp::shm::Heap::mine().free(block_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }
  fastddp::shm::Operand operand() const { return {data_, numel_, element_}; }

  // Elements repeat with a period that divides no chunk size, so that a misplaced element is wrong.
  // Many periods are written and compared at a time, because sanitizers make single ones slow.
  void fill(std::size_t begin, std::size_t numel, const std::vector<double>& period) {
    for_blocks(begin, numel, period, [](char* data, const char* expected, std::size_t bytes) {
      std::memcpy(data, expected, bytes);
    });
  }

  void check_part(std::size_t begin, std::size_t numel, const std::vector<double>& period) const {
    for_blocks(begin, numel, period, [](char* data, const char* expected, std::size_t bytes) {
      CHECK(std::memcmp(data, expected, bytes) == 0);
    });
  }

  // With the guards.
  void check(std::size_t begin, std::size_t numel, const std::vector<double>& period) const {
    check_part(begin, numel, period);
    const std::vector<char> marks(2 * kGuard, kMark);
    const auto before = static_cast<std::size_t>(data_ - block_);
    CHECK(std::memcmp(block_, marks.data(), before) == 0);
    CHECK(std::memcmp(data_ + bytes_, marks.data(), 2 * kGuard - before) == 0);
  }

 private:
  template <typename Visit>
  void for_blocks(std::size_t begin,
                  std::size_t numel,
                  const std::vector<double>& period,
                  const Visit& visit) const {
    const std::size_t size = fastddp::size_of(element_);
    const std::size_t block = std::min(numel, 256 * period.size());
    std::vector<char> expected(block * size);
    for (std::size_t i = 0; i < block; ++i)
      store(element_, expected.data(), i, period[i % period.size()]);
    for (std::size_t i = 0; i < numel; i += block)
      visit(data_ + (begin + i) * size, expected.data(), std::min(block, numel - i) * size);
  }

  static constexpr std::size_t kGuard = 128;
  static constexpr char kMark = 0x5A;
  Element element_;
  std::size_t numel_;
  std::size_t bytes_;
  std::vector<char> ordinary_;
  char* block_ = nullptr;
  char* data_ = nullptr;
};

constexpr std::size_t kPeriod = 13;

inline std::vector<double> values(std::size_t rank, std::size_t seed) {
  std::vector<double> period(kPeriod);
  for (std::size_t i = 0; i < kPeriod; ++i)
    period[i] = static_cast<double>((i * 5 + rank * 3 + seed) % 7 + 1);
  return period;
}

inline double combine(Reduction reduction, double a, double b) {
  switch (reduction) {
    case Reduction::kMin:
      return std::min(a, b);
    case Reduction::kMax:
      return std::max(a, b);
    case Reduction::kBxor:
      return static_cast<double>(static_cast<int>(a) ^ static_cast<int>(b));
    default:
      return a + b;
  }
}

inline std::vector<double> reduced(const Case& what, std::size_t ranks, std::size_t seed) {
  std::vector<double> result = values(0, seed);
  for (std::size_t rank = 1; rank < ranks; ++rank) {
    const auto next = values(rank, seed);
    for (std::size_t i = 0; i < kPeriod; ++i)
      result[i] = combine(what.reduction, result[i], next[i]);
  }
  for (double& value : result) {
    if (what.reduction == Reduction::kAvg) value /= static_cast<double>(ranks);
    char rounded[8];
    store(what.element, rounded, 0, value);
    value = load(what.element, rounded, 0);
  }
  return result;
}

inline void all_reduce(
    Rank& rank, const Case& what, std::size_t numel, bool in_heap, std::size_t seed) {
  Buffer buffer(in_heap, what.element, numel);
  buffer.fill(0, numel, values(rank.me, seed));
  rank.collectives.all_reduce(buffer.operand(), what.reduction, static_cast<double>(rank.ranks),
                              ranks::soon());
  buffer.check(0, numel, reduced(what, rank.ranks, seed));
}

inline void broadcast(Rank& rank,
                      Element element,
                      std::size_t numel,
                      bool in_heap,
                      std::size_t seed,
                      std::size_t root) {
  Buffer buffer(in_heap, element, numel);
  buffer.fill(0, numel, values(rank.me, seed));
  rank.collectives.broadcast(buffer.operand(), static_cast<int>(root), ranks::soon());
  buffer.check(0, numel, values(root, seed));
}

inline void all_gather(
    Rank& rank, Element element, std::size_t numel, bool in_heap, std::size_t seed, bool in_place) {
  const std::size_t bytes = numel * fastddp::size_of(element);
  Buffer output(in_heap, element, numel * rank.ranks);
  Buffer input(in_heap, element, numel);
  std::vector<void*> outputs;
  for (std::size_t k = 0; k < rank.ranks; ++k) outputs.push_back(output.data() + k * bytes);
  auto operand = input.operand();
  if (in_place) operand.data = outputs[rank.me];
  input.fill(0, numel, values(rank.me, seed));
  output.fill(rank.me * numel, numel, values(rank.me, seed));
  rank.collectives.all_gather(operand, outputs, ranks::soon());
  for (std::size_t k = 0; k < rank.ranks; ++k) output.check(k * numel, numel, values(k, seed));
  input.check(0, numel, values(rank.me, seed));
}

inline void reduce_scatter(Rank& rank,
                           const Case& what,
                           std::size_t numel,
                           bool in_heap,
                           std::size_t seed,
                           bool is_block) {
  const std::size_t bytes = numel * fastddp::size_of(what.element);
  Buffer input(in_heap, what.element, numel * rank.ranks);
  Buffer output(false, what.element, numel);
  std::vector<void*> inputs;
  for (std::size_t k = 0; k < rank.ranks; ++k) {
    inputs.push_back(input.data() + k * bytes);
    input.fill(k * numel, numel, values(rank.me, seed + k));
  }
  rank.collectives.reduce_scatter(output.operand(), inputs, is_block ? input.data() : nullptr,
                                  what.reduction, static_cast<double>(rank.ranks), ranks::soon());
  output.check(0, numel, reduced(what, rank.ranks, seed + rank.me));
  for (std::size_t k = 0; k < rank.ranks; ++k)
    input.check(k * numel, numel, values(rank.me, seed + k));
}

// One collective of a random sequence. All ranks draw the same one from `shared`; each rank draws
// for itself where its operands lie.
inline void random_collective(Rank& rank, std::mt19937& shared, std::mt19937& own) {
  static constexpr std::size_t kNumels[] = {0, 1, 5, 100, 1023, 2049, 20000, 70001};
  const std::size_t numel = kNumels[shared() % std::size(kNumels)];
  const Case what = kCases[shared() % std::size(kCases)];
  const std::size_t seed = shared() % 100;
  const std::size_t kind = shared() % 7;
  const std::size_t root = shared() % rank.ranks;
  const bool all_in_heap = shared() % 2 == 0;
  const bool in_heap = all_in_heap || own() % 2 == 0;
  switch (kind) {
    case 0:
      return rank.collectives.barrier(ranks::soon());
    case 1:
      return rank.collectives.announce(fastddp::shm::Kind::kGather, 0, ranks::soon());
    case 2:
      return broadcast(rank, what.element, numel, in_heap, seed, root);
    case 3:
      return all_gather(rank, what.element, numel, in_heap, seed, own() % 2 == 0);
    case 4:
      return reduce_scatter(rank, what, numel, in_heap, seed, all_in_heap || own() % 2 == 0);
    default:
      return all_reduce(rank, what, numel, in_heap, seed);
  }
}

}  // namespace operands
