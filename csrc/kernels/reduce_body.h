// The body of reduce.h, compiled once for each instruction set by reduce_<isa>.cpp, which defines
//
//   REDUCE_TARGET  the function attribute that allows the instruction set
//   REDUCE_WIDTH   bytes in a vector: 16, or 32 with AVX2 and F16C, or 64 with AVX-512 F, BW and VL
//
// Every function here carries REDUCE_TARGET and lives in the anonymous namespace, and none but
// builtins are called. Otherwise the linker, which keeps one of several equal inline functions,
// could give the plain version one with instructions that the CPU does not have.
//
// Vectors are the GCC vector extension, which Clang shares: the operators work on each lane, do not
// promote, and a comparison gives a mask. Arithmetic is on unsigned integers, whose overflow wraps.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/reduce.h"

#if REDUCE_WIDTH > 16
#include <immintrin.h>
#endif

#define REDUCE_INLINE [[gnu::always_inline]] REDUCE_TARGET inline

namespace fastddp {
namespace {

constexpr std::size_t kWidth = REDUCE_WIDTH;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(REDUCE_WIDTH)));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

using Bytes = Vector<std::uint8_t>;
using Words = Vector<std::uint32_t>;
using Floats = Vector<float>;

// The formats: how a vector in memory is decoded into the type of the computation, and encoded
// again.

template <typename T>
struct Native {
  static constexpr std::size_t kSize = sizeof(T);
  using Scalar = T;
  using Wide = Vector<T>;
  REDUCE_INLINE static Wide decode(Bytes memory) { return reinterpret_cast<Wide>(memory); }
  REDUCE_INLINE static Bytes encode(Wide value) { return reinterpret_cast<Bytes>(value); }
};

// 16-bit floats, widened: a vector of memory becomes two vectors of floats.
struct Pair {
  Floats first;
  Floats second;
};

// A bfloat16 is the upper half of a float, so the elements at odd places need no shift.
struct Brain {
  static constexpr std::size_t kSize = 2;
  using Scalar = float;
  using Wide = Pair;

  REDUCE_INLINE static Pair decode(Bytes memory) {
    const auto words = reinterpret_cast<Words>(memory);
    return {reinterpret_cast<Floats>(words << 16), reinterpret_cast<Floats>(words & 0xFFFF0000u)};
  }

  REDUCE_INLINE static Bytes encode(Pair value) {
    return reinterpret_cast<Bytes>(round(value.first) >> 16 | (round(value.second) & 0xFFFF0000u));
  }

  // Does what to_bfloat16() does, and leaves the result in the upper half.
  REDUCE_INLINE static Words round(Floats value) {
    const auto bits = reinterpret_cast<Words>(value);
    const Words rounded = bits + (0x7FFFu + (bits >> 16 & 1u));
    return value == value ? rounded : Words{} + 0x7FC00000u;
  }
};

struct Half {
  static constexpr std::size_t kSize = 2;
  using Scalar = float;
  using Wide = Pair;

#if REDUCE_WIDTH == 64
  // All masks are full. GCC 12 warns about its own header in the forms without a mask.
  REDUCE_INLINE static Pair decode(Bytes memory) {
    const auto halves = reinterpret_cast<__m512i>(memory);
    return {_mm512_maskz_cvtph_ps(0xFFFF, _mm512_maskz_extracti64x4_epi64(0xF, halves, 0)),
            _mm512_maskz_cvtph_ps(0xFFFF, _mm512_maskz_extracti64x4_epi64(0xF, halves, 1))};
  }

  REDUCE_INLINE static Bytes encode(Pair value) {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT;
    const __m256i first = _mm512_maskz_cvtps_ph(0xFFFF, strip(value.first), kRound);
    const __m256i second = _mm512_maskz_cvtps_ph(0xFFFF, strip(value.second), kRound);
    const __m512i half = _mm512_maskz_inserti64x4(0xFF, __m512i{}, first, 0);
    return reinterpret_cast<Bytes>(_mm512_maskz_inserti64x4(0xFF, half, second, 1));
  }
#elif REDUCE_WIDTH == 32
  REDUCE_INLINE static Pair decode(Bytes memory) {
    const auto halves = reinterpret_cast<__m256i>(memory);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
  }

  REDUCE_INLINE static Bytes encode(Pair value) {
    const __m128i first = _mm256_cvtps_ph(strip(value.first), _MM_FROUND_TO_NEAREST_INT);
    const __m128i second = _mm256_cvtps_ph(strip(value.second), _MM_FROUND_TO_NEAREST_INT);
    return reinterpret_cast<Bytes>(
        _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
  }
#else
  REDUCE_INLINE static Pair decode(Bytes memory) {
    const auto words = reinterpret_cast<Words>(memory);
    return {widen(words & 0xFFFFu), widen(words >> 16)};
  }

  REDUCE_INLINE static Bytes encode(Pair value) {
    return reinterpret_cast<Bytes>(narrow(value.first) | narrow(value.second) << 16);
  }
#endif

  // The instruction keeps the payload of a NaN, to_float16() only its sign. (decode made it quiet.)
  REDUCE_INLINE static Floats strip(Floats value) {
    const auto nan = reinterpret_cast<Words>(value != value);
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) & ~(nan & 0x003FFFFFu));
  }

  // Does what to_float() does in each lane. Comparisons are signed because SSE2 has no others.
  REDUCE_INLINE static Floats widen(Words half) {
    using Ints = Vector<std::int32_t>;
    const Words magnitude = half & 0x7FFFu;
    const auto order = reinterpret_cast<Ints>(magnitude);
    const Words shifted = magnitude << 13;
    const Words quiet = order > 0x7C00 ? Words{} + 0x00400000u : Words{};
    const Floats tiny = __builtin_convertvector(order, Floats) * 0x1p-24f;
    const Words large = order >= 0x7C00 ? (shifted + 0x70000000u) | quiet : shifted + 0x38000000u;
    const Words result = order < 0x0400 ? reinterpret_cast<Words>(tiny) : large;
    return reinterpret_cast<Floats>(result | (half & 0x8000u) << 16);
  }

  // Does what to_float16() does in each lane.
  REDUCE_INLINE static Words narrow(Floats value) {
    using Ints = Vector<std::int32_t>;
    const auto bits = reinterpret_cast<Words>(value);
    const Words magnitude = bits & 0x7FFFFFFFu;
    const auto order = reinterpret_cast<Ints>(magnitude);
    const Words rebiased = magnitude - 0x38000000u;
    const Words normal = (rebiased + 0x0FFFu + (rebiased >> 13 & 1u)) >> 13;
    const Floats aligned = reinterpret_cast<Floats>(magnitude) + 0.5f;
    const Words tiny = reinterpret_cast<Words>(aligned) - 0x3F000000u;
    const Words infinite = order > 0x7F800000 ? Words{} + 0x7E00u : Words{} + 0x7C00u;
    const Words finite = order < 0x38800000 ? tiny : normal;
    return (order >= 0x477FF000 ? infinite : finite) | (bits >> 16 & 0x8000u);
  }
};

// The operations, on one vector or on both vectors of a pair.

struct Sum {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return a + b;
  }
};

struct Product {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return a * b;
  }
};

struct Min {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return b < a ? b : a;
  }
};

struct Max {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return a < b ? b : a;
  }
};

struct Band {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return a & b;
  }
};

struct Bor {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return a | b;
  }
};

struct Bxor {
  template <typename V>
  REDUCE_INLINE static V combine(V a, V b) {
    return a ^ b;
  }
};

struct Avg : Sum {};

template <typename Op, typename V>
REDUCE_INLINE V combine(V a, V b) {
  if constexpr (std::is_same_v<V, Pair>) {
    return {Op::combine(a.first, b.first), Op::combine(a.second, b.second)};
  } else {
    return Op::combine(a, b);
  }
}

template <typename Op, typename V, typename Scalar>
REDUCE_INLINE V finish(V value, Scalar divisor) {
  if constexpr (!std::is_same_v<Op, Avg>) {
    return value;
  } else if constexpr (std::is_same_v<V, Pair>) {
    return {value.first / divisor, value.second / divisor};
  } else {
    return value / divisor;
  }
}

// A vector anywhere in memory. GCC 12 would copy it by memcpy in two scalar halves.
typedef std::uint8_t Unaligned __attribute__((vector_size(REDUCE_WIDTH), aligned(1), may_alias));

// The first `size` bytes of a vector, the others zero.
REDUCE_INLINE Bytes load(const void* src, std::size_t at, std::size_t size) {
  const char* from = static_cast<const char*>(src) + at;
  if (size == kWidth) return *reinterpret_cast<const Unaligned*>(from);
  Bytes memory{};
  std::memcpy(&memory, from, size);
  return memory;
}

REDUCE_INLINE void store(void* dst, std::size_t at, Bytes memory, std::size_t size) {
  char* to = static_cast<char*>(dst) + at;
  if (size == kWidth)
    *reinterpret_cast<Unaligned*>(to) = memory;
  else
    std::memcpy(to, &memory, size);
}

// Reduces kVectors vectors of `size` bytes each, at byte `at`. Reads everything before it writes
// anything, because a destination may be a source.
template <typename Format, typename Op, std::size_t kVectors>
REDUCE_INLINE void step(void* const* dsts,
                        std::size_t num_dsts,
                        const void* const* srcs,
                        std::size_t num_srcs,
                        std::size_t at,
                        std::size_t size,
                        typename Format::Scalar divisor) {
  typename Format::Wide sum[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v)
    sum[v] = Format::decode(load(srcs[0], at + v * kWidth, size));
  for (std::size_t s = 1; s < num_srcs; ++s)
    for (std::size_t v = 0; v < kVectors; ++v)
      sum[v] = combine<Op>(sum[v], Format::decode(load(srcs[s], at + v * kWidth, size)));
  Bytes result[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v)
    result[v] = Format::encode(finish<Op>(sum[v], divisor));
  for (std::size_t d = 0; d < num_dsts; ++d)
    for (std::size_t v = 0; v < kVectors; ++v) store(dsts[d], at + v * kWidth, result[v], size);
}

template <typename Format, typename Op>
REDUCE_INLINE void loop(void* const* dsts,
                        std::size_t num_dsts,
                        const void* const* srcs,
                        std::size_t num_srcs,
                        std::size_t bytes,
                        typename Format::Scalar divisor) {
  constexpr std::size_t kVectors = 4;
  std::size_t at = 0;
  for (; at + kVectors * kWidth <= bytes; at += kVectors * kWidth)
    step<Format, Op, kVectors>(dsts, num_dsts, srcs, num_srcs, at, kWidth, divisor);
  for (; at + kWidth <= bytes; at += kWidth)
    step<Format, Op, 1>(dsts, num_dsts, srcs, num_srcs, at, kWidth, divisor);
  if (at < bytes) step<Format, Op, 1>(dsts, num_dsts, srcs, num_srcs, at, bytes - at, divisor);
}

template <typename Format, typename Op>
REDUCE_TARGET void reduce(void* const* dsts,
                          std::size_t num_dsts,
                          const void* const* srcs,
                          std::size_t num_srcs,
                          std::size_t numel,
                          double divisor) {
  const auto scalar = static_cast<typename Format::Scalar>(divisor);
  const std::size_t bytes = numel * Format::kSize;
  if (num_srcs == 2 && num_dsts == 2) {  // two ranks: the loops over ranks unroll
    void* const both_dsts[] = {dsts[0], dsts[1]};
    const void* const both_srcs[] = {srcs[0], srcs[1]};
    loop<Format, Op>(both_dsts, 2, both_srcs, 2, bytes, scalar);
  } else {
    loop<Format, Op>(dsts, num_dsts, srcs, num_srcs, bytes, scalar);
  }
}

template <typename Format>
REDUCE_TARGET Reduce find_floating(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return reduce<Format, Sum>;
    case Reduction::kAvg:
      return reduce<Format, Avg>;
    case Reduction::kProduct:
      return reduce<Format, Product>;
    case Reduction::kMin:
      return reduce<Format, Min>;
    case Reduction::kMax:
      return reduce<Format, Max>;
    default:
      return nullptr;
  }
}

template <typename T>
REDUCE_TARGET Reduce find_integer(Reduction reduction) {
  using Unsigned = Native<std::make_unsigned_t<T>>;
  switch (reduction) {
    case Reduction::kSum:
      return reduce<Unsigned, Sum>;
    case Reduction::kProduct:
      return reduce<Unsigned, Product>;
    case Reduction::kMin:
      return reduce<Native<T>, Min>;
    case Reduction::kMax:
      return reduce<Native<T>, Max>;
    case Reduction::kBand:
      return reduce<Unsigned, Band>;
    case Reduction::kBor:
      return reduce<Unsigned, Bor>;
    case Reduction::kBxor:
      return reduce<Unsigned, Bxor>;
    default:
      return nullptr;
  }
}

REDUCE_TARGET Reduce find_bool(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
    case Reduction::kMax:
    case Reduction::kBor:
      return find_integer<std::uint8_t>(Reduction::kBor);
    case Reduction::kProduct:
    case Reduction::kMin:
    case Reduction::kBand:
      return find_integer<std::uint8_t>(Reduction::kBand);
    default:
      return find_integer<std::uint8_t>(reduction);
  }
}

REDUCE_TARGET Reduce find(Element element, Reduction reduction) {
  switch (element) {
    case Element::kFloat32:
      return find_floating<Native<float>>(reduction);
    case Element::kFloat64:
      return find_floating<Native<double>>(reduction);
    case Element::kFloat16:
      return find_floating<Half>(reduction);
    case Element::kBFloat16:
      return find_floating<Brain>(reduction);
    case Element::kInt8:
      return find_integer<std::int8_t>(reduction);
    case Element::kUInt8:
      return find_integer<std::uint8_t>(reduction);
    case Element::kInt16:
      return find_integer<std::int16_t>(reduction);
    case Element::kInt32:
      return find_integer<std::int32_t>(reduction);
    case Element::kInt64:
      return find_integer<std::int64_t>(reduction);
    case Element::kBool:
      return find_bool(reduction);
  }
  return nullptr;
}

}  // namespace
}  // namespace fastddp
