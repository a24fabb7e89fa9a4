// Element-wise reductions over the memory of several ranks.
//
// The same loops are compiled for several instruction sets, and the best one that the processor has
// is used. All give the same bits: each operation rounds once, none are fused, and the order is
// that of the sources.
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
  kBool
};

enum class Reduction : std::uint8_t { kSum, kAvg, kProduct, kMin, kMax, kBand, kBor, kBxor };

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

// dsts[k][i] = srcs[0][i] op srcs[1][i] op ... for every k and i, in this order.
//
// A destination may be one of the sources, but may not overlap one in part. 16-bit floats are
// computed in float and rounded once, at the end. Integers wrap around. A minimum or maximum with a
// NaN is NaN. The sum and the maximum of bools is "or", their product and minimum "and". An average
// is the sum, divided once by `divisor`; other reductions ignore it.
using Reduce = void (*)(void* const* dsts,
                        std::size_t num_dsts,
                        const void* const* srcs,
                        std::size_t num_srcs,
                        std::size_t numel,
                        double divisor);

enum class Isa : std::uint8_t { kPlain, kAvx2, kAvx512 };

// The instruction sets that were compiled and that this processor has; the last is the best.
const std::vector<Isa>& usable_isas();

// Null where the combination means nothing: bitwise on floats, an average of integers or bools.
Reduce find_reduce(Element element, Reduction reduction);
Reduce find_reduce(Element element, Reduction reduction, Isa isa);

}  // namespace fastddp
