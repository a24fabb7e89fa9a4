#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "kernels/reduce.h"

using fastddp::available_isas;
using fastddp::BFloat16;
using fastddp::Element;
using fastddp::find_reduce;
using fastddp::Float16;
using fastddp::Isa;
using fastddp::Reduction;

namespace {

constexpr double kDivisor = 3;  // not a power of two, so multiplying by its reciprocal would differ
constexpr Element kElements[] = {
    Element::kFloat32, Element::kFloat64, Element::kFloat16, Element::kBFloat16, Element::kInt8,
    Element::kUInt8,   Element::kInt16,   Element::kInt32,   Element::kInt64,    Element::kBool};
constexpr Reduction kReductions[] = {Reduction::kSum, Reduction::kAvg, Reduction::kProduct,
                                     Reduction::kMin, Reduction::kMax, Reduction::kBand,
                                     Reduction::kBor, Reduction::kBxor};

bool is_floating(Element element) { return element <= Element::kBFloat16; }

bool is_bitwise(Reduction reduction) { return reduction >= Reduction::kBand; }

// The reference: one element at a time, as simply as possible.

template <typename T>
T combine_floating(Reduction reduction, T a, T b) {
  switch (reduction) {
    case Reduction::kProduct:
      return a * b;
    case Reduction::kMin:
      return std::min(a, b);
    case Reduction::kMax:
      return std::max(a, b);
    default:
      return a + b;
  }
}

template <typename T>
T combine_integer(Reduction reduction, T a, T b) {
  // 64 bits hold a sum and a product modulo 2^64; narrowing takes it modulo 2^bits.
  const auto x = static_cast<std::uint64_t>(a);
  const auto y = static_cast<std::uint64_t>(b);
  switch (reduction) {
    case Reduction::kSum:
      return static_cast<T>(x + y);
    case Reduction::kProduct:
      return static_cast<T>(x * y);
    case Reduction::kMin:
      return std::min(a, b);
    case Reduction::kMax:
      return std::max(a, b);
    case Reduction::kBand:
      return static_cast<T>(x & y);
    case Reduction::kBor:
      return static_cast<T>(x | y);
    default:
      return static_cast<T>(x ^ y);
  }
}

bool combine_bool(Reduction reduction, bool a, bool b) {
  switch (reduction) {
    case Reduction::kSum:
    case Reduction::kMax:
    case Reduction::kBor:
      return a || b;
    case Reduction::kBxor:
      return a != b;
    default:
      return a && b;
  }
}

template <typename T>
T read(const unsigned char* memory) {
  T value;
  std::memcpy(&value, memory, sizeof(T));
  return value;
}

using Sources = std::vector<const unsigned char*>;

template <typename Stored, typename Computed, typename Load, typename Combine, typename Store>
void fold(unsigned char* dst, const Sources& srcs, Load load, Combine combine, Store store) {
  Computed value = load(read<Stored>(srcs[0]));
  for (std::size_t s = 1; s < srcs.size(); ++s) value = combine(value, load(read<Stored>(srcs[s])));
  const Stored stored = store(value);
  std::memcpy(dst, &stored, sizeof(stored));
}

template <typename Stored, typename Computed, typename Load, typename Store>
void fold_floating(
    Reduction reduction, unsigned char* dst, const Sources& srcs, Load load, Store store) {
  fold<Stored, Computed>(
      dst, srcs, load, [=](Computed a, Computed b) { return combine_floating(reduction, a, b); },
      [=](Computed value) {
        return store(reduction == Reduction::kAvg ? value / static_cast<Computed>(kDivisor)
                                                  : value);
      });
}

template <typename T>
void fold_integer(Reduction reduction, unsigned char* dst, const Sources& srcs) {
  const auto same = [](T value) { return value; };
  const auto combine = [=](T a, T b) { return combine_integer(reduction, a, b); };
  fold<T, T>(dst, srcs, same, combine, same);
}

// Returns one element of the result.
void expect(Element element, Reduction reduction, unsigned char* dst, const Sources& srcs) {
  switch (element) {
    case Element::kFloat32: {
      const auto same = [](float value) { return value; };
      return fold_floating<float, float>(reduction, dst, srcs, same, same);
    }
    case Element::kFloat64: {
      const auto same = [](double value) { return value; };
      return fold_floating<double, double>(reduction, dst, srcs, same, same);
    }
    case Element::kFloat16:
      return fold_floating<Float16, float>(
          reduction, dst, srcs, [](Float16 value) { return fastddp::to_float(value); },
          fastddp::to_float16);
    case Element::kBFloat16:
      return fold_floating<BFloat16, float>(
          reduction, dst, srcs, [](BFloat16 value) { return fastddp::to_float(value); },
          fastddp::to_bfloat16);
    case Element::kInt8:
      return fold_integer<std::int8_t>(reduction, dst, srcs);
    case Element::kUInt8:
      return fold_integer<std::uint8_t>(reduction, dst, srcs);
    case Element::kInt16:
      return fold_integer<std::int16_t>(reduction, dst, srcs);
    case Element::kInt32:
      return fold_integer<std::int32_t>(reduction, dst, srcs);
    case Element::kInt64:
      return fold_integer<std::int64_t>(reduction, dst, srcs);
    case Element::kBool: {
      const auto load = [](unsigned char byte) { return byte != 0; };
      const auto combine = [=](bool a, bool b) { return combine_bool(reduction, a, b); };
      const auto store = [](bool value) { return static_cast<unsigned char>(value ? 1 : 0); };
      return fold<unsigned char, bool>(dst, srcs, load, combine, store);
    }
  }
}

bool is_nan(Element element, const unsigned char* memory) {
  switch (element) {
    case Element::kFloat32:
      return std::isnan(read<float>(memory));
    case Element::kFloat64:
      return std::isnan(read<double>(memory));
    case Element::kFloat16:
      return std::isnan(fastddp::to_float(read<Float16>(memory)));
    case Element::kBFloat16:
      return std::isnan(fastddp::to_float(read<BFloat16>(memory)));
    default:
      return false;
  }
}

// The memory of several ranks. Each is an allocation that ends with its elements, so that ASan sees
// one element too many; `offset` elements in front of them must not change.
class Ranks {
 public:
  Ranks(Element element, std::size_t num_ranks, std::size_t numel, std::size_t offset)
      : offset_(offset * size_of(element)),
        memory_(num_ranks, std::vector<unsigned char>(offset_ + numel * size_of(element), 0xA5)) {}

  unsigned char* at(std::size_t rank) { return memory_[rank].data() + offset_; }

  std::vector<void*> pointers() {
    std::vector<void*> all;
    for (std::size_t rank = 0; rank < memory_.size(); ++rank) all.push_back(at(rank));
    return all;
  }

  bool prefix_is_untouched() const {
    return std::all_of(memory_.begin(), memory_.end(), [this](const auto& memory) {
      return std::all_of(memory.begin(), memory.begin() + static_cast<std::ptrdiff_t>(offset_),
                         [](unsigned char byte) { return byte == 0xA5; });
    });
  }

 private:
  std::size_t offset_;
  std::vector<std::vector<unsigned char>> memory_;
};

// Fills memory with random bits: every kind of number, including NaNs and subnormals.
void fill(Element element, unsigned char* memory, std::size_t numel, std::mt19937& random) {
  for (std::size_t i = 0; i < numel * size_of(element); ++i)
    memory[i] = static_cast<unsigned char>(element == Element::kBool ? random() & 1 : random());
}

void check_equal(Element element,
                 const unsigned char* actual,
                 const unsigned char* expected,
                 std::size_t numel) {
  const std::size_t size = size_of(element);
  for (std::size_t i = 0; i < numel; ++i, actual += size, expected += size)
    CHECK(std::memcmp(actual, expected, size) == 0 ||
          (is_nan(element, actual) && is_nan(element, expected)));
}

// Reduces random memory, in place or into `num_dsts` destinations, and compares.
void check_reduce(Element element,
                  Reduction reduction,
                  Isa isa,
                  std::size_t num_srcs,
                  std::size_t num_dsts,  // 0: into the sources
                  std::size_t numel,
                  std::size_t offset) {
  std::mt19937 random(static_cast<unsigned>(numel * 8 + num_srcs));
  Ranks srcs(element, num_srcs, numel, offset);
  Ranks dsts(element, num_dsts, numel, offset + 1);
  for (std::size_t s = 0; s < num_srcs; ++s) fill(element, srcs.at(s), numel, random);
  std::vector<unsigned char> expected(numel * size_of(element));
  for (std::size_t at = 0; at < expected.size(); at += size_of(element)) {
    Sources one;
    for (std::size_t s = 0; s < num_srcs; ++s) one.push_back(srcs.at(s) + at);
    expect(element, reduction, expected.data() + at, one);
  }
  Ranks& target = num_dsts == 0 ? srcs : dsts;
  const std::vector<void*> to = target.pointers();
  const std::vector<void*> from = srcs.pointers();
  find_reduce(element, reduction, isa)(to.data(), to.size(), from.data(), from.size(), numel,
                                       kDivisor);
  for (std::size_t d = 0; d < to.size(); ++d)
    check_equal(element, target.at(d), expected.data(), numel);
  CHECK(srcs.prefix_is_untouched() && dsts.prefix_is_untouched());
}

template <typename Check>
void for_each_version(Check check) {
  for (const Isa isa : available_isas())
    for (const Element element : kElements)
      for (const Reduction reduction : kReductions)
        if (find_reduce(element, reduction, isa) != nullptr) check(element, reduction, isa);
}

// Two sources, one element each, on every version.
template <typename T>
void check_pair(Element element, Reduction reduction, T first, T second, T expected) {
  for (const Isa isa : available_isas()) {
    T result{};
    void* const dsts[] = {&result};
    const void* const srcs[] = {&first, &second};
    find_reduce(element, reduction, isa)(dsts, 1, srcs, 2, 1, 2);
    CHECK(std::memcmp(&result, &expected, sizeof(T)) == 0);
  }
}

void check_half(Reduction reduction,
                std::uint16_t first,
                std::uint16_t second,
                std::uint16_t expected) {
  check_pair(Element::kFloat16, reduction, first, second, expected);
}

void check_brain(Reduction reduction,
                 std::uint16_t first,
                 std::uint16_t second,
                 std::uint16_t expected) {
  check_pair(Element::kBFloat16, reduction, first, second, expected);
}

}  // namespace

TEST(combinations_without_a_meaning_are_not_there) {
  for (const Element element : kElements)
    for (const Reduction reduction : kReductions) {
      const bool means_something =
          is_floating(element) ? !is_bitwise(reduction) : reduction != Reduction::kAvg;
      for (const Isa isa : available_isas())
        CHECK((find_reduce(element, reduction, isa) != nullptr) == means_something);
      CHECK(find_reduce(element, reduction) ==
            find_reduce(element, reduction, available_isas().back()));
    }
}

TEST(every_count_of_sources_in_place_and_into_others) {
  for_each_version([](Element element, Reduction reduction, Isa isa) {
    for (const std::size_t num_srcs : {1, 2, 3, 4, 5, 8})
      for (const std::size_t num_dsts : {0, 1, 2, 3})
        for (const std::size_t numel : {0, 1, 37, 300})
          check_reduce(element, reduction, isa, num_srcs, num_dsts, numel, 1);
  });
}

TEST(every_length_around_a_vector_and_every_start) {
  for_each_version([](Element element, Reduction reduction, Isa isa) {
    for (std::size_t numel = 0; numel < 140; numel += numel < 70 ? 1 : 7)
      for (const std::size_t offset : {0, 1, 2, 3})
        check_reduce(element, reduction, isa, 2, offset % 2, numel, offset);
  });
}

TEST(one_destination_may_be_any_of_the_sources) {
  for (const Isa isa : available_isas())
    for (std::size_t into = 0; into < 4; ++into) {
      std::vector<std::vector<float>> ranks;
      for (std::size_t rank = 0; rank < 4; ++rank)
        ranks.emplace_back(101, static_cast<float>(rank + 1));
      const void* const srcs[] = {ranks[0].data(), ranks[1].data(), ranks[2].data(),
                                  ranks[3].data()};
      void* const dsts[] = {ranks[into].data()};
      find_reduce(Element::kFloat32, Reduction::kSum, isa)(dsts, 1, srcs, 4, 101, 1);
      for (std::size_t rank = 0; rank < 4; ++rank)
        for (const float value : ranks[rank])
          CHECK(value == (rank == into ? 10.0f : static_cast<float>(rank + 1)));
    }
}

// Every pair of a 16-bit float with a few others: rounding, overflow, subnormals, each NaN.
TEST(sixteen_bit_floats_agree_with_half_h_for_every_bit_pattern) {
  constexpr std::size_t kAll = 0x10000;
  std::vector<std::uint16_t> first(kAll);
  for (std::size_t i = 0; i < kAll; ++i) first[i] = static_cast<std::uint16_t>(i);
  for (const Isa isa : available_isas())
    for (const Element element : {Element::kFloat16, Element::kBFloat16})
      for (const Reduction reduction :
           {Reduction::kSum, Reduction::kAvg, Reduction::kProduct, Reduction::kMin})
        for (const unsigned other :
             {0x0000u, 0x8001u, 0x03FFu, 0x3C01u, 0x3F81u, 0xC2ABu, 0x7BFFu}) {
          const std::vector<std::uint16_t> second(kAll, static_cast<std::uint16_t>(other));
          std::vector<std::uint16_t> actual(kAll);
          std::vector<std::uint16_t> expected(kAll);
          void* const dsts[] = {actual.data()};
          const void* const srcs[] = {first.data(), second.data()};
          find_reduce(element, reduction, isa)(dsts, 1, srcs, 2, kAll, kDivisor);
          for (std::size_t i = 0; i < kAll; ++i)
            expect(element, reduction, reinterpret_cast<unsigned char*>(&expected[i]),
                   {reinterpret_cast<const unsigned char*>(&first[i]),
                    reinterpret_cast<const unsigned char*>(&second[i])});
          CHECK(actual == expected);  // only one operand is a NaN, so even its bits are fixed
        }
}

TEST(sixteen_bit_floats_are_rounded_once_after_the_last_source) {
  // 1 + 2^-11 + 2^-11 in float16: rounding after each addition would lose both halves.
  const std::uint16_t one = fastddp::to_float16(1.0f).bits;
  const std::uint16_t small = fastddp::to_float16(0x1p-11f).bits;
  for (const Isa isa : available_isas()) {
    std::uint16_t result = 0;
    void* const dsts[] = {&result};
    const void* const srcs[] = {&one, &small, &small};
    find_reduce(Element::kFloat16, Reduction::kSum, isa)(dsts, 1, srcs, 3, 1, 1);
    CHECK(result == fastddp::to_float16(1.0f + 0x1p-10f).bits);
    // The sum overflows float16, the average does not.
    const std::uint16_t largest = 0x7BFF;
    const void* const large[] = {&largest, &largest};
    find_reduce(Element::kFloat16, Reduction::kAvg, isa)(dsts, 1, large, 2, 1, 2);
    CHECK(result == largest);
  }
}

TEST(not_a_number_keeps_its_payload_in_wide_floats_and_its_sign_in_float16) {
  const auto payload = std::bit_cast<float>(0xFFC12345u);
  check_pair(Element::kFloat32, Reduction::kSum, payload, 1.0f, payload);
  check_pair(Element::kFloat32, Reduction::kSum, 1.0f, payload, payload);
  check_half(Reduction::kSum, 0x3C00, 0x7D01, 0x7E00);  // signalling, with a payload
  check_half(Reduction::kSum, 0xFFFF, 0x3C00, 0xFE00);
  check_brain(Reduction::kSum, 0x3F80, 0x7F81, 0x7FC0);
  check_brain(Reduction::kSum, 0xFFFF, 0x3F80, 0x7FC0);
}

TEST(minimum_and_maximum_keep_the_first_unless_the_next_is_beyond_it) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Reduction reduction : {Reduction::kMin, Reduction::kMax}) {
    check_pair(Element::kFloat32, reduction, nan, 1.0f, nan);
    check_pair(Element::kFloat32, reduction, 1.0f, nan, 1.0f);
    check_pair(Element::kFloat32, reduction, -0.0f, 0.0f, -0.0f);
    check_pair(Element::kFloat32, reduction, 0.0f, -0.0f, 0.0f);
    check_half(reduction, 0x7E00, 0x3C00, 0x7E00);
    check_half(reduction, 0x3C00, 0x7E00, 0x3C00);
    check_half(reduction, 0x8000, 0x0000, 0x8000);
    check_brain(reduction, 0x3F80, 0x7FC0, 0x3F80);
  }
}

TEST(integers_wrap) {
  check_pair<std::int8_t>(Element::kInt8, Reduction::kSum, 127, 2, -127);
  check_pair<std::uint8_t>(Element::kUInt8, Reduction::kProduct, 100, 100, 16);
  check_pair<std::int16_t>(Element::kInt16, Reduction::kProduct, -32768, -1, -32768);
  check_pair<std::int32_t>(Element::kInt32, Reduction::kSum, 2147483647, 2, -2147483647);
  check_pair<std::int64_t>(Element::kInt64, Reduction::kProduct,
                           std::numeric_limits<std::int64_t>::min(), -1,
                           std::numeric_limits<std::int64_t>::min());
}

TEST(subnormals_are_kept) {
  check_pair(Element::kFloat32, Reduction::kSum, 0x1p-149f, 0x1p-149f, 0x1p-148f);
  check_half(Reduction::kSum, 0x0001, 0x0001, 0x0002);
  check_half(Reduction::kAvg, 0x0001, 0x0000, 0x0000);  // halfway between 0 and 2^-24: to even
  check_brain(Reduction::kSum, 0x0001, 0x0001, 0x0002);
}

int main() { return check::run(); }
