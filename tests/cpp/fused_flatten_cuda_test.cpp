// Compares the wrappers of the kernels, which run on the CPU through cuda_standin/, with the loops
// of fused_flatten_cpu.cpp. Both run the same functions, so the bits have to be the same. What
// those functions compute is tested in fused_flatten_test.cpp.
#include "kernels/fused_flatten.cu"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "flatten_case.h"

using namespace fastddp;

namespace {

constexpr double kThird = 1.0 / 3;

bool same_bits(const Moments& a, const Moments& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

Moments flatten_on_gpu(FlattenCase& test, double scale) {
  // Exactly as much scratch as asked for. It holds NaNs, which show where it is read but not
  // written.
  std::vector<float> scratch(cuda::moments_scratch(test.pieces()), std::nanf(""));
  Moments moments{-1, -1};
  cuda::fused_flatten(test.pass(scale), test.pieces(), test.flat(), nullptr, &moments,
                      scratch.data());
  return moments;
}

// Both orders of a block's threads: a missing barrier shows in at least one.
template <typename Body>
void in_both_orders(Body body) {
  for (const bool downwards : {false, true}) {
    standin::downwards = downwards;
    body();
  }
}

}  // namespace

TEST(flatten_writes_the_bits_of_the_cpu) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : all_shifts()) {
      FlattenCase test(piece, flat, edge_sizes(chunk_numel(piece)), shift);
      test.pieces()[4].data = nullptr;
      fused_flatten(test.pass(kThird), test.pieces(), test.flat());
      const auto want = test.flat_bytes();
      test.clear_flat();
      cuda::fused_flatten(test.pass(kThird), test.pieces(), test.flat(), nullptr);
      CHECK(test.flat_bytes() == want);
    }
  }
}

TEST(unflatten_writes_the_bits_of_the_cpu) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : all_shifts()) {
      FlattenCase test(piece, flat, edge_sizes(chunk_numel(flat)), shift);
      fused_flatten(test.pass(1), test.pieces(), test.flat());
      fused_unflatten(test.pass(kThird), test.pieces(), test.flat());
      const auto want = test.piece_bytes();
      test.clear_pieces();
      cuda::fused_unflatten(test.pass(kThird), test.pieces(), test.flat(), nullptr);
      CHECK(test.piece_bytes() == want);
    }
  }
}

TEST(moments_have_the_bits_of_the_cpu) {
  for (const auto& [piece, flat] : all_pairs()) {
    for (const auto& shift : {FlattenCase::Shift{0, 0}, {3, 3}, {1, 0}}) {
      const std::int64_t chunk = chunk_numel(piece);
      FlattenCase test(piece, flat, {9, 0, 257, 100, chunk - 1, chunk, chunk + 5}, shift);
      test.pieces()[3].data = nullptr;
      Moments want{};
      fused_flatten(test.pass(kThird), test.pieces(), test.flat(), &want);
      const auto bytes = test.flat_bytes();
      in_both_orders([&] {
        test.clear_flat();
        CHECK(same_bits(flatten_on_gpu(test, kThird), want));
        CHECK(test.flat_bytes() == bytes);
      });
      store(piece, test.pieces().back().data, 5, std::nan(""));
      CHECK(flatten_on_gpu(test, kThird).finite == 0);
    }
  }
}

TEST(moments_of_two_launches_and_of_more_blocks_than_threads) {
  const std::vector<std::int64_t> sizes(kLargeTable + 10, 3);
  FlattenCase test(DType::kBFloat16, DType::kFloat32, sizes);
  Moments want{};
  fused_flatten(test.pass(1), test.pieces(), test.flat(), &want);
  standin::num_launches = 0;
  CHECK(same_bits(flatten_on_gpu(test, 1), want));
  CHECK(standin::num_launches == 3);
}

TEST(nothing_has_moments_too) {
  Moments moments{-1, -1};
  cuda::fused_flatten({DType::kFloat32, DType::kFloat32, 1}, {}, nullptr, nullptr, &moments);
  CHECK(moments.sum_of_squares == 0 && moments.finite == 1);
}

TEST(a_tensor_in_its_own_place_is_scaled_there) {
  for (const auto& shift : all_shifts()) {
    FlattenCase test(DType::kFloat32, DType::kFloat32, edge_sizes(4096), shift);
    fused_flatten(test.pass(1), test.pieces(), test.flat());
    for (Piece& piece : test.pieces()) piece.data = static_cast<float*>(test.flat()) + piece.offset;
    const auto before = test.flat_bytes();
    fused_flatten(test.pass(kThird), test.pieces(), test.flat());
    const auto want = test.flat_bytes();
    in_both_orders([&] {
      std::memcpy(test.flat(), before.data(), before.size());
      cuda::fused_flatten(test.pass(kThird), test.pieces(), test.flat(), nullptr);
      CHECK(test.flat_bytes() == want);
    });
  }
}

TEST(the_number_of_launches_is_that_of_the_tables) {
  const auto num_launches = [](std::size_t num_pieces) {
    FlattenCase test(DType::kFloat32, DType::kFloat32, std::vector<std::int64_t>(num_pieces, 5));
    standin::num_launches = 0;
    cuda::fused_flatten(test.pass(kThird), test.pieces(), test.flat(), nullptr);
    CHECK(test.flat_is_scaled(kThird));
    return standin::num_launches;
  };
  CHECK(num_launches(0) == 0);
  CHECK(num_launches(kSmallTable) == 1);
  CHECK(num_launches(kSmallTable + 1) == 1);
  CHECK(num_launches(kLargeTable) == 1);
  CHECK(num_launches(3000) == 3);
}

TEST(launches_go_to_the_stream_that_is_given) {
  FlattenCase test(DType::kFloat32, DType::kFloat32, {5});
  int stream = 0;
  cuda::fused_flatten(test.pass(1), test.pieces(), test.flat(), &stream);
  CHECK(static_cast<void*>(standin::last_stream) == &stream);
}

TEST(a_launch_that_fails_is_an_error_with_its_text_and_is_not_left_behind) {
  FlattenCase test(DType::kFloat32, DType::kFloat32, {5});
  standin::fail_with = cudaErrorInvalidValue;
  std::string what;
  try {
    cuda::fused_unflatten(test.pass(1), test.pieces(), test.flat(), nullptr);
  } catch (const std::runtime_error& error) {
    what = error.what();
  }
  CHECK(what.find("invalid argument") != std::string::npos);
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST(what_the_caller_got_wrong_is_refused) {
  FlattenCase test(DType::kFloat32, DType::kFloat32, {5});
  Moments moments{};
  CHECK_THROWS(
      cuda::fused_flatten(test.pass(1), test.pieces(), test.flat(), nullptr, &moments, nullptr),
      std::invalid_argument);
  alignas(8) float scratch[9];
  CHECK_THROWS(
      cuda::fused_flatten(test.pass(1), test.pieces(), test.flat(), nullptr, &moments, scratch + 1),
      std::invalid_argument);
  CHECK_THROWS(cuda::fused_flatten({DType::kFloat64, DType::kFloat32, 1}, {}, nullptr, nullptr),
               std::invalid_argument);
}

int main() { return check::run(); }
