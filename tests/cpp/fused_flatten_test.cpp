#include "kernels/fused_flatten.h"

#include <cmath>
#include <limits>
#include <stdexcept>

#include "check.h"
#include "flatten_case.h"
#include "kernels/flatten_launches.h"

using namespace fastddp;

namespace {

constexpr double kThird = 1.0 / 3;

bool close(double a, double b) { return std::abs(a - b) <= 1e-5 * std::abs(b); }

}  // namespace

TEST(flatten_scales_and_rounds_like_double_arithmetic) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : all_shifts()) {
      FlattenCase test(piece, flat, edge_sizes(chunk_numel(piece)), shift);
      fused_flatten(test.pass(kThird), test.pieces(), test.flat());
      CHECK(test.flat_is_scaled(kThird));
    }
  }
}

TEST(unflatten_scales_and_rounds_like_double_arithmetic) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : all_shifts()) {
      FlattenCase test(piece, flat, edge_sizes(chunk_numel(flat)), shift);
      fused_flatten(test.pass(1), test.pieces(), test.flat());
      fused_unflatten(test.pass(kThird), test.pieces(), test.flat());
      CHECK(test.pieces_are_scaled(kThird));
    }
  }
}

TEST(what_is_too_big_too_small_or_no_number_is_converted_as_well) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const auto& [piece, flat] : all_pairs()) {
    FlattenCase test(piece, flat, {100});
    const double values[] = {kInfinity, -kInfinity, std::nan(""), 0,    -0.0, 1e30,
                             65519,     65520,      1e-45,        6e-8, 3e-8};
    std::int64_t at = 0;
    for (const double value : values) store(piece, test.pieces()[0].data, at++, value);
    fused_flatten(test.pass(1), test.pieces(), test.flat());
    CHECK(test.flat_is_scaled(1));
  }
}

TEST(a_null_piece_is_zeros_whatever_the_scale) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : all_shifts()) {
      FlattenCase test(piece, flat, edge_sizes(chunk_numel(piece)), shift);
      for (std::size_t i = 0; i < test.pieces().size(); i += 3) test.pieces()[i].data = nullptr;
      fused_flatten(test.pass(kThird), test.pieces(), test.flat());
      CHECK(test.flat_is_scaled(kThird));
      for (auto& one : test.pieces()) one.data = nullptr;
      Moments moments{-1, -1};
      fused_flatten(test.pass(-HUGE_VAL), test.pieces(), test.flat(), &moments);
      CHECK(test.flat_is_scaled(1));  // +0
      CHECK(moments.sum_of_squares == 0 && moments.finite == 1);
    }
  }
}

TEST(a_tensor_in_its_own_place_is_scaled_there) {
  for (const auto& [piece, flat] : all_pairs()) {
    if (size_of(piece) != size_of(flat)) continue;  // it cannot be its own place
    FlattenCase test(piece, flat, edge_sizes(chunk_numel(piece)), {1, 1});
    FlattenCase in_place(piece, flat, edge_sizes(chunk_numel(piece)), {1, 1});
    for (std::size_t i = 0; i < test.pieces().size(); ++i) {
      const Piece& from = test.pieces()[i];
      Piece& to = in_place.pieces()[i];
      const auto size = static_cast<std::int64_t>(size_of(flat));
      to.data = static_cast<char*>(in_place.flat()) + to.offset * size;
      if (from.numel > 0)
        std::memcpy(to.data, from.data, static_cast<std::size_t>(from.numel * size));
    }
    fused_flatten(test.pass(kThird), test.pieces(), test.flat());
    fused_flatten(in_place.pass(kThird), in_place.pieces(), in_place.flat());
    CHECK(in_place.flat_bytes() == test.flat_bytes());
  }
}

TEST(thousands_of_tiny_tensors) {
  std::vector<std::int64_t> sizes;
  for (int i = 0; i < 3000; ++i) sizes.push_back(i % 37);
  FlattenCase test(DType::kFloat32, DType::kBFloat16, sizes);
  fused_flatten(test.pass(kThird), test.pieces(), test.flat());
  CHECK(test.flat_is_scaled(kThird));
  fused_unflatten(test.pass(3), test.pieces(), test.flat());
  CHECK(test.pieces_are_scaled(3));
}

TEST(moments_are_those_of_the_values_as_written) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : all_shifts()) {
      FlattenCase test(piece, flat, edge_sizes(chunk_numel(piece)), shift);
      Moments moments{};
      fused_flatten(test.pass(kThird), test.pieces(), test.flat(), &moments);
      CHECK(test.flat_is_scaled(kThird));
      CHECK(close(moments.sum_of_squares, test.moments().sum_of_squares));
      CHECK(moments.finite == 1);
    }
  }
}

TEST(one_value_that_is_not_finite_is_found_wherever_it_is) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto sizes = edge_sizes(chunk_numel(DType::kBFloat16));
  FlattenCase test(DType::kFloat32, DType::kBFloat16, sizes, {0, 4});
  Moments moments{};
  for (const auto& piece : test.pieces()) {
    for (const std::int64_t at : {std::int64_t{0}, piece.numel / 2, piece.numel - 1}) {
      if (piece.numel == 0) continue;
      const double before = load(DType::kFloat32, piece.data, at);
      for (const double value : {kInfinity, -kInfinity, std::nan("")}) {
        store(DType::kFloat32, piece.data, at, value);
        fused_flatten(test.pass(1), test.pieces(), test.flat(), &moments);
        CHECK(moments.finite == 0);
      }
      store(DType::kFloat32, piece.data, at, before);
    }
  }
  fused_flatten(test.pass(1), test.pieces(), test.flat(), &moments);
  CHECK(moments.finite == 1);
}

TEST(a_value_that_only_rounding_makes_infinite_is_not_finite) {
  FlattenCase test(DType::kFloat32, DType::kFloat16, {5});
  store(DType::kFloat32, test.pieces()[0].data, 3, 1e5);
  Moments moments{};
  fused_flatten(test.pass(1), test.pieces(), test.flat(), &moments);
  CHECK(moments.finite == 0);
  fused_flatten(test.pass(0.5), test.pieces(), test.flat(), &moments);
  CHECK(moments.finite == 1);
}

TEST(nothing_has_moments_too) {
  Moments moments{-1, -1};
  const FlatPass pass{DType::kFloat32, DType::kFloat32, 1};
  fused_flatten(pass, {}, nullptr, &moments);
  CHECK(moments.sum_of_squares == 0 && moments.finite == 1);
  fused_flatten(pass, {{nullptr, 0, 0}}, nullptr, &moments);
  CHECK(moments.sum_of_squares == 0 && moments.finite == 1);
}

TEST(a_pair_without_a_conversion_is_refused) {
  for (const DType other : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    CHECK_THROWS(fused_flatten({DType::kFloat64, other, 1}, {}, nullptr), std::invalid_argument);
    CHECK_THROWS(fused_unflatten({DType::kFloat64, other, 1}, {}, nullptr), std::invalid_argument);
    CHECK_THROWS(fused_flatten({other, DType::kFloat64, 1}, {}, nullptr), std::invalid_argument);
  }
}

int main() { return check::run(); }
