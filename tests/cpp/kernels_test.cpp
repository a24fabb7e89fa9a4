#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "kernels/scale.h"
#include "kernels/stream.h"

using fastddp::BFloat16;
using fastddp::DType;
using fastddp::Float16;
using fastddp::scale_add;
using fastddp::scale_copy;

TEST(half_conversions_round_trip_for_every_bit_pattern) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const float half = fastddp::to_float(Float16{pattern});
    if (half == half) CHECK(fastddp::to_float16(half).bits == pattern);
    const float brain = fastddp::to_float(BFloat16{pattern});
    if (brain == brain) CHECK(fastddp::to_bfloat16(brain).bits == pattern);
  }
}

TEST(float16_is_rounded_to_the_nearest_and_ties_to_even) {
  CHECK(fastddp::to_float16(65519.0f).bits == 0x7BFF);
  CHECK(fastddp::to_float16(65520.0f).bits == 0x7C00);  // halfway to 65536: infinity
  CHECK(fastddp::to_float16(1.0f + 0x1p-11f).bits == 0x3C00);
  CHECK(fastddp::to_float16(1.0f + 3 * 0x1p-11f).bits == 0x3C02);
  CHECK(fastddp::to_float16(0x1p-24f).bits == 0x0001);
  CHECK(fastddp::to_float16(0x1p-25f).bits == 0x0000);
  CHECK(fastddp::to_float16(0x1.8p-25f).bits == 0x0001);
  CHECK(fastddp::to_float16(-0x1p-24f).bits == 0x8001);
  CHECK(fastddp::to_float16(0x1.ffep-15f).bits == 0x0400);  // rounds up to the least normal
}

TEST(not_a_number_stays_one) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(fastddp::to_float(fastddp::to_float16(nan))));
  CHECK(std::isnan(fastddp::to_float(fastddp::to_bfloat16(nan))));
  CHECK(std::isnan(fastddp::to_float(fastddp::to_bfloat16(std::bit_cast<float>(0x7F800001u)))));
  CHECK(std::isinf(fastddp::to_float(fastddp::to_float16(std::numeric_limits<float>::infinity()))));
}

TEST(copies_of_every_length_scale_and_stay_in_bounds) {
  for (std::size_t numel = 0; numel < 70; ++numel) {
    std::vector<float> src(numel);
    std::vector<float> dst(numel + 2, -1.0f);
    for (std::size_t i = 0; i < numel; ++i) src[i] = static_cast<float>(i) * 3;
    scale_copy(DType::kFloat32, dst.data() + 1, DType::kFloat32, src.data(), numel, 1.0 / 3);
    CHECK(dst.front() == -1.0f && dst.back() == -1.0f);
    for (std::size_t i = 0; i < numel; ++i)
      CHECK(dst[i + 1] == src[i] * static_cast<float>(1.0 / 3));
  }
}

TEST(scaling_in_place_is_allowed) {
  std::vector<double> values{2, 4, 6};
  scale_copy(DType::kFloat64, values.data(), DType::kFloat64, values.data(), values.size(), 0.5);
  CHECK((values == std::vector<double>{1, 2, 3}));
}

TEST(adding_rounds_the_product_before_the_sum) {
  // A fused multiply-add would give 2^-24 + 2^-48 more than this.
  float sum = 1.0f;
  const float value = 1.0f + 0x1p-23f;
  scale_add(DType::kFloat32, &sum, DType::kFloat32, &value, 1, 0x1p-1 + 0x1p-24);
  const float product = value * static_cast<float>(0x1p-1 + 0x1p-24);
  CHECK(sum == 1.0f + product);

  std::uint16_t brain_sum = fastddp::to_bfloat16(1.0f).bits;
  const std::uint16_t brain_value = fastddp::to_bfloat16(3.0f).bits;
  scale_add(DType::kBFloat16, &brain_sum, DType::kBFloat16, &brain_value, 1, 1.0 / 3);
  CHECK(fastddp::to_float(BFloat16{brain_sum}) == 2.0f);
}

TEST(a_stream_copy_copies_every_byte_and_no_other) {
  alignas(64) static char to[1024];
  std::vector<char> from(1024);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<char>(i * 7 + 1);
  for (const std::size_t bytes : {0u, 1u, 63u, 64u, 65u, 127u, 128u, 500u, 1000u}) {
    for (const std::size_t at : {0u, 1u, 13u}) {
      std::fill(std::begin(to), std::end(to), '?');
      fastddp::stream_copy(to, from.data() + at, bytes);
      CHECK(std::equal(to, to + bytes, from.data() + at));
      CHECK(std::all_of(to + bytes, to + 1024, [](char c) { return c == '?'; }));
    }
  }
}

int main() { return check::run(); }
