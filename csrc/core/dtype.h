// The element types a gradient can have. Complex gradients are reduced as pairs of their real type.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastddp {

enum class DType : std::uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  return 0;
}

// Whether gradients of one type can be converted to the other: float64 goes to float64 only.
constexpr bool converts(DType from, DType to) {
  return from == to || (from != DType::kFloat64 && to != DType::kFloat64);
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

}  // namespace fastddp
