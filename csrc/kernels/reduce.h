#pragma once
#include <cstddef>
#include <cstdint>
namespace fastddp {
enum class Element : std::uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64, kBool };
constexpr std::size_t size_of(Element e) {
  switch (e) { case Element::kFloat64: case Element::kInt64: return 8; case Element::kFloat32: case Element::kInt32: return 4;
   case Element::kFloat16: case Element::kBFloat16: case Element::kInt16: return 2; default: return 1; }
}
enum class Reduction : std::uint8_t { kSum, kAvg, kProduct, kMin, kMax, kBand, kBor, kBxor };
using Reduce = void (*)(void* const* dsts, std::size_t num_dsts, const void* const* srcs, std::size_t num_srcs, std::size_t numel, double divisor);
Reduce find_reduce(Element, Reduction);
}
