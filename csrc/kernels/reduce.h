// Element-wise reductions over several ranks' memory, in the widest vectors this CPU has.
//
// Every version gives the same bits:
// - Sources are combined in the order given, each operation rounds once, nothing is fused.
// - Integers wrap. A bool is a byte that is 0 or 1; its sum is "or" and its product is "and".
// - Minimum and maximum are std::min and std::max of what was reduced so far and the next source:
//   a NaN in the first source stays, a NaN in a later one loses, and so does an equal zero.
// - 16-bit floats are combined in float and rounded once, as core/half.h does, at the end. A NaN
//   becomes 0x7FC0 in bfloat16 and the one with its sign, 0x7E00 or 0xFE00, in float16.
// - One freedom is left: where several NaNs meet in a sum or product, any of them may be the
// result,
//   because an FPU keeps its first operand and compilers may swap operands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastddp {

enum class Element : std::uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt8,
  kUInt8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
};

constexpr std::size_t size_of(Element element) {
  switch (element) {
    case Element::kFloat64:
    case Element::kInt64:
      return 8;
    case Element::kFloat32:
    case Element::kInt32:
      return 4;
    case Element::kFloat16:
    case Element::kBFloat16:
    case Element::kInt16:
      return 2;
    case Element::kInt8:
    case Element::kUInt8:
    case Element::kBool:
      return 1;
  }
  return 0;
}

enum class Reduction : std::uint8_t { kSum, kAvg, kProduct, kMin, kMax, kBand, kBor, kBxor };

// dst[k][i] = src[0][i] op ... op src[num_srcs - 1][i] for every destination k and i < numel.
// At least one source; the sum of kAvg is divided by `divisor`, which other reductions ignore.
// A destination may be one of the sources, at the same address, but must not overlap a source in
// part; destinations must not overlap each other. Pointers need the alignment of one element.
using Reduce = void (*)(void* const* dsts,
                        std::size_t num_dsts,
                        const void* const* srcs,
                        std::size_t num_srcs,
                        std::size_t numel,
                        double divisor);

// Returns nullptr where the combination has no meaning: bitwise operations on floats, and averages
// of anything but floats.
Reduce find_reduce(Element element, Reduction reduction);

// The instruction sets that have a version. kPlain is what the compiler targets by default.
enum class Isa : std::uint8_t { kPlain, kAvx2, kAvx512 };

// Returns the instruction sets that this CPU and operating system support, narrowest first.
// find_reduce() takes the last.
const std::vector<Isa>& available_isas();

// Returns the version for one of available_isas().
Reduce find_reduce(Element element, Reduction reduction, Isa isa);

}  // namespace fastddp
