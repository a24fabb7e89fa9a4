// Tensors and a flat buffer for the tests of the fused flatten, and the values that a pass has to
// write, computed in double. Each is an allocation of its exact size, so that AddressSanitizer sees
// one element too many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/half.h"
#include "kernels/fused_flatten.h"

namespace fastddp {

inline const std::vector<std::pair<DType, DType>>& all_pairs() {
  static const auto pairs = [] {
    std::vector<std::pair<DType, DType>> all{{DType::kFloat64, DType::kFloat64}};
    for (const DType from : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const DType to : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        all.emplace_back(from, to);
    }
    return all;
  }();
  return pairs;
}

inline double load(DType dtype, const void* data, std::int64_t index) {
  const auto* at = static_cast<const char*>(data) + index * static_cast<int>(size_of(dtype));
  double wide = 0;
  float single = 0;
  std::uint16_t bits = 0;
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(&wide, at, sizeof wide);
      return wide;
    case DType::kFloat32:
      std::memcpy(&single, at, sizeof single);
      return single;
    case DType::kFloat16:
      std::memcpy(&bits, at, sizeof bits);
      return to_float(Float16{bits});
    case DType::kBFloat16:
      std::memcpy(&bits, at, sizeof bits);
      return to_float(BFloat16{bits});
  }
  return wide;
}

inline void store(DType dtype, void* data, std::int64_t index, double value) {
  auto* at = static_cast<char*>(data) + index * static_cast<int>(size_of(dtype));
  const auto single = static_cast<float>(value);
  const Float16 half = to_float16(single);
  const BFloat16 brain = to_bfloat16(single);
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(at, &value, sizeof value);
      return;
    case DType::kFloat32:
      std::memcpy(at, &single, sizeof single);
      return;
    case DType::kFloat16:
      std::memcpy(at, &half, sizeof half);
      return;
    case DType::kBFloat16:
      std::memcpy(at, &brain, sizeof brain);
      return;
  }
}

// The nearest number with `bits` bits behind the point and exponents of at least `least`; ties to
// even. Written from the definition, because core/half.h is part of what is tested.
inline double nearest(double value, int bits, int least, double greatest) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double quantum = std::ldexp(1.0, std::max(std::ilogb(value), least) - bits);
  const double rounded = std::nearbyint(value / quantum) * quantum;
  return std::abs(rounded) > greatest ? std::copysign(HUGE_VAL, value) : rounded;
}

// A float product is exact in double, so the cast rounds it as the multiplication of floats does.
inline double expected(DType target, double value, double scale) {
  if (target == DType::kFloat64) return value * scale;
  const auto product = static_cast<float>(value * static_cast<double>(static_cast<float>(scale)));
  if (target == DType::kFloat16) return nearest(product, 10, -14, 65504);
  if (target == DType::kBFloat16) return nearest(product, 7, -126, 0x1.FEp127);
  return product;
}

class FlattenCase {
 public:
  // Where tensors and their places begin, in elements past an address that 16 bytes divide.
  struct Shift {
    int piece;
    int flat;
  };

  FlattenCase(DType piece, DType flat, const std::vector<std::int64_t>& sizes, Shift shift = {})
      : piece_(piece), flat_(flat) {
    const auto aligned = static_cast<std::int64_t>(16 / size_of(flat));
    for (const std::int64_t numel : sizes) {
      numel_ = (numel_ + aligned - 1) / aligned * aligned + shift.flat;
      pieces_.push_back({allocate(piece, numel, shift.piece), numel_, numel});
      numel_ += numel;
    }
    flat_data_ = allocate(flat, numel_, 0);
    clear_flat();
    // Some are subnormal in float16.
    for (const Piece& one : pieces_) {
      for (std::int64_t i = 0; i < one.numel; ++i)
        store(piece, one.data, i, std::ldexp(normal_(random_), exponent_(random_)));
    }
  }

  void clear_pieces() {
    for (const Piece& piece : pieces_) {
      for (std::int64_t i = 0; i < piece.numel; ++i) store(piece_, piece.data, i, kUntouched);
    }
  }

  void clear_flat() {
    for (std::int64_t i = 0; i < numel_; ++i) store(flat_, flat_data_, i, kUntouched);
  }

  // Whether every place holds its tensor, scaled, and everything between the places is unchanged.
  bool flat_is_scaled(double scale) const {
    std::int64_t at = 0;
    for (const Piece& piece : pieces_) {
      for (; at < piece.offset; ++at)
        if (load(flat_, flat_data_, at) != kUntouched) return false;
      for (std::int64_t i = 0; i < piece.numel; ++i, ++at) {
        const double value = piece.data == nullptr ? 0 : load(piece_, piece.data, i);
        if (!same(load(flat_, flat_data_, at), expected(flat_, value, scale))) return false;
      }
    }
    return at == numel_;
  }

  bool pieces_are_scaled(double scale) const {
    for (const Piece& piece : pieces_) {
      for (std::int64_t i = 0; i < piece.numel; ++i) {
        const double value = load(flat_, flat_data_, piece.offset + i);
        if (!same(load(piece_, piece.data, i), expected(piece_, value, scale))) return false;
      }
    }
    return true;
  }

  // The sum over all places, in double.
  Moments moments() const {
    Moments sum{0, 1};
    for (const Piece& piece : pieces_) {
      for (std::int64_t i = 0; i < piece.numel; ++i) {
        const double value = load(flat_, flat_data_, piece.offset + i);
        sum.sum_of_squares += value * value;
        if (!std::isfinite(value)) sum.finite = 0;
      }
    }
    return sum;
  }

  std::vector<char> flat_bytes() const { return bytes(flat_data_, flat_, numel_); }

  std::vector<char> piece_bytes() const {
    std::vector<char> all;
    for (const Piece& piece : pieces_) {
      const auto one = bytes(piece.data, piece_, piece.numel);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }

  FlatPass pass(double scale) const { return {piece_, flat_, scale}; }
  std::vector<Piece>& pieces() { return pieces_; }
  void* flat() { return flat_data_; }
  std::int64_t numel() const { return numel_; }

 private:
  static constexpr double kUntouched = 77;

  static bool same(double a, double b) {
    return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
  }

  static std::vector<char> bytes(const void* data, DType dtype, std::int64_t numel) {
    const auto* begin = static_cast<const char*>(data);
    return {begin, begin + numel * static_cast<std::int64_t>(size_of(dtype))};
  }

  void* allocate(DType dtype, std::int64_t numel, int shift) {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    memory_.push_back(std::make_unique<char[]>(static_cast<std::size_t>((numel + shift) * size)));
    return memory_.back().get() + shift * size;
  }

  DType piece_;
  DType flat_;
  std::vector<std::unique_ptr<char[]>> memory_;  // 16 bytes divide where each begins
  std::vector<Piece> pieces_;
  void* flat_data_ = nullptr;
  std::int64_t numel_ = 0;
  std::mt19937 random_{12345};
  std::normal_distribution<double> normal_;
  std::uniform_int_distribution<int> exponent_{-20, 4};
};

// Sizes around everything a kernel counts in: a pack, a block of threads, a chunk.
inline std::vector<std::int64_t> edge_sizes(std::int64_t chunk) {
  return {1, 0, 2, 3, 7, 8, 9, 15, 17, 255, 256, 257, chunk - 1, chunk, chunk + 1, 2 * chunk + 9};
}

inline const std::vector<FlattenCase::Shift>& all_shifts() {
  static const std::vector<FlattenCase::Shift> shifts{{0, 0}, {0, 1}, {0, 4}, {1, 0}, {1, 1},
                                                      {3, 3}, {4, 4}, {4, 0}, {3, 1}, {1, 4}};
  return shifts;
}

}  // namespace fastddp
