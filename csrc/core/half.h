// bfloat16 and float16 as bit patterns, converted by round-to-nearest-even exactly as torch
// does it: the two engines give the same bits only because these functions do. Guarded by
// tests/cpp/kernels_test.cpp and tests/unit/test_kernels.py.
#pragma once

#include <bit>
#include <cstdint>

namespace fastddp {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

inline BFloat16 to_bfloat16(float value) {
  if (value != value)
    return {0x7FC0};  // the only NaN torch makes; rounding could turn another one into infinity
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounding = 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<std::uint16_t>((bits + rounding) >> 16)};
}

inline float to_float(Float16 value) {
  const std::uint32_t wide = static_cast<std::uint32_t>(value.bits) << 16;
  const std::uint32_t sign = wide & 0x80000000u;
  const std::uint32_t magnitude = wide & 0x7FFF0000u;
  std::uint32_t result = 0;
  if (magnitude >= 0x7C000000u) {  // infinity, NaN
    result = 0x7F800000u | (magnitude << 3 >> 6 & 0x007FFFFFu);
    result |= (value.bits & 0x3FFu) != 0 ? 0x00400000u : 0u;
  } else if (magnitude >= 0x04000000u) {  // normal: move the exponent's bias from 15 to 127
    result = (magnitude >> 3) + 0x38000000u;
  } else {  // subnormal: an integer multiple of 2^-24, exact in float
    result = std::bit_cast<std::uint32_t>(static_cast<float>(value.bits & 0x3FFu) * 0x1p-24f);
  }
  return std::bit_cast<float>(sign | result);
}

inline Float16 to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t half = 0;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // at least 65520: rounds to infinity
    half = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal in half
    const std::uint32_t rebiased = magnitude - 0x38000000u;
    half = (rebiased + 0x0FFFu + (rebiased >> 13 & 1u)) >> 13;
  } else {  // adding 0.5 aligns the result's last place with float's, so the FPU does the rounding
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(shifted) - 0x3F000000u;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace fastddp
