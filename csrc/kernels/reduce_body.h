// The loops of reduce.h, for the instruction set that the including file has chosen. Everything has
// internal linkage, and what is included here was included there before the choice: the linker
// would otherwise take any file's copy of an inline function for all, also that of a file whose
// instructions the processor does not have.

namespace fastddp {
namespace {

// One pass over so few elements that they stay in the first-level cache.
constexpr std::size_t kBlock = 1024;

// dst == src or apart: no iteration depends on another.
#if defined(__clang__)
#define FASTDDP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTDDP_INDEPENDENT _Pragma("GCC ivdep")
#endif

// ---- element types: what they are computed in, and the way there and back --------------

template <typename T>
struct As {
  using Compute = T;
  static void load(T* to, const T* from, std::size_t numel) {
    FASTDDP_INDEPENDENT
    for (std::size_t i = 0; i < numel; ++i) to[i] = from[i];
  }
  static void store(T* to, const T* from, std::size_t numel) { load(to, from, numel); }
};

template <>
struct As<BFloat16> {
  using Compute = float;
  static void load(float* to, const BFloat16* from, std::size_t numel) {
    FASTDDP_INDEPENDENT
    for (std::size_t i = 0; i < numel; ++i) to[i] = to_float(from[i]);
  }
  static void store(BFloat16* to, const float* from, std::size_t numel) {
    FASTDDP_INDEPENDENT
    for (std::size_t i = 0; i < numel; ++i) to[i] = to_bfloat16(from[i]);
  }
};

template <>
struct As<Float16> {
  using Compute = float;
  static void load(float* to, const Float16* from, std::size_t numel) {
    std::size_t i = 0;
#if defined(FASTDDP_F16C)
    for (; i + 8 <= numel; i += 8) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
    }
#endif
    for (; i < numel; ++i) to[i] = to_float(from[i]);
  }
  static void store(Float16* to, const float* from, std::size_t numel) {
    std::size_t i = 0;
#if defined(FASTDDP_F16C)
    const __m128i magnitude = _mm_set1_epi16(0x7FFF);
    const __m128i infinity = _mm_set1_epi16(0x7C00);
    const __m128i nan = _mm_set1_epi16(0x7E00);
    for (; i + 8 <= numel; i += 8) {
      __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      // One NaN, as in half.h; the instruction would keep its payload.
      const __m128i is_nan = _mm_cmpgt_epi16(_mm_and_si128(bits, magnitude), infinity);
      const __m128i signed_nan = _mm_or_si128(_mm_andnot_si128(magnitude, bits), nan);
      bits = _mm_blendv_epi8(bits, signed_nan, is_nan);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
    }
#endif
    for (; i < numel; ++i) to[i] = to_float16(from[i]);
  }
};

// ---- operations ------------------------------------------------------------------------

template <typename T>
struct Unsigned {
  using Type = T;  // floats, and what cannot overflow into undefined behaviour
};
template <>
struct Unsigned<std::int32_t> {
  using Type = std::uint32_t;
};
template <>
struct Unsigned<std::int64_t> {
  using Type = std::uint64_t;
};

struct Sum {
  template <typename T>
  static T apply(T a, T b) {
    using U = typename Unsigned<T>::Type;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  }
};

struct Product {
  template <typename T>
  static T apply(T a, T b) {
    using U = typename Unsigned<T>::Type;
    return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
  }
};

struct Min {
  template <typename T>
  static T apply(T a, T b) {
    return a < b || a != a ? a : b;
  }
};

struct Max {
  template <typename T>
  static T apply(T a, T b) {
    return a > b || a != a ? a : b;
  }
};

struct And {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};

struct Or {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};

struct Xor {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

// ---- loops -----------------------------------------------------------------------------

// Two ranks, each of which gets the result where its operand was: the common case, without a
// detour.
template <typename T, typename Op>
void reduce_two(T* a, T* b, std::size_t numel) {
  FASTDDP_INDEPENDENT
  for (std::size_t i = 0; i < numel; ++i) {
    const T value = Op::apply(a[i], b[i]);
    a[i] = value;
    b[i] = value;
  }
}

template <typename T, typename Op>
void reduce_block(typename As<T>::Compute* sum,
                  const void* const* srcs,
                  std::size_t num_srcs,
                  std::size_t begin,
                  std::size_t numel) {
  using Compute = typename As<T>::Compute;
  As<T>::load(sum, static_cast<const T*>(srcs[0]) + begin, numel);
  alignas(64) Compute next[kBlock];
  for (std::size_t k = 1; k < num_srcs; ++k) {
    As<T>::load(next, static_cast<const T*>(srcs[k]) + begin, numel);
    for (std::size_t i = 0; i < numel; ++i) sum[i] = Op::apply(sum[i], next[i]);
  }
}

template <typename T, typename Op, bool kDivides>
void reduce_all(void* const* dsts,
                std::size_t num_dsts,
                const void* const* srcs,
                std::size_t num_srcs,
                std::size_t numel,
                double divisor) {
  using Compute = typename As<T>::Compute;
  if constexpr (!kDivides && sizeof(T) == sizeof(Compute)) {
    if (num_dsts == 2 && num_srcs == 2 && dsts[0] == srcs[0] && dsts[1] == srcs[1] &&
        dsts[0] != dsts[1]) {
      return reduce_two<T, Op>(static_cast<T*>(dsts[0]), static_cast<T*>(dsts[1]), numel);
    }
  }
  alignas(64) Compute sum[kBlock];
  for (std::size_t begin = 0; begin < numel; begin += kBlock) {
    const std::size_t count = numel - begin < kBlock ? numel - begin : kBlock;
    reduce_block<T, Op>(sum, srcs, num_srcs, begin, count);
    if constexpr (kDivides) {
      const auto by = static_cast<Compute>(divisor);
      for (std::size_t i = 0; i < count; ++i) sum[i] = sum[i] / by;
    }
    for (std::size_t k = 0; k < num_dsts; ++k)
      As<T>::store(static_cast<T*>(dsts[k]) + begin, sum, count);
  }
}

template <typename T>
Reduce of_floats(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return &reduce_all<T, Sum, false>;
    case Reduction::kAvg:
      return &reduce_all<T, Sum, true>;
    case Reduction::kProduct:
      return &reduce_all<T, Product, false>;
    case Reduction::kMin:
      return &reduce_all<T, Min, false>;
    case Reduction::kMax:
      return &reduce_all<T, Max, false>;
    default:
      return nullptr;
  }
}

template <typename T>
Reduce of_integers(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return &reduce_all<T, Sum, false>;
    case Reduction::kProduct:
      return &reduce_all<T, Product, false>;
    case Reduction::kMin:
      return &reduce_all<T, Min, false>;
    case Reduction::kMax:
      return &reduce_all<T, Max, false>;
    case Reduction::kBand:
      return &reduce_all<T, And, false>;
    case Reduction::kBor:
      return &reduce_all<T, Or, false>;
    case Reduction::kBxor:
      return &reduce_all<T, Xor, false>;
    case Reduction::kAvg:
      return nullptr;
  }
  return nullptr;
}

Reduce of_bools(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
    case Reduction::kMax:
    case Reduction::kBor:
      return &reduce_all<std::uint8_t, Or, false>;
    case Reduction::kProduct:
    case Reduction::kMin:
    case Reduction::kBand:
      return &reduce_all<std::uint8_t, And, false>;
    case Reduction::kBxor:
      return &reduce_all<std::uint8_t, Xor, false>;
    case Reduction::kAvg:
      return nullptr;
  }
  return nullptr;
}

Reduce find(Element element, Reduction reduction) {
  switch (element) {
    case Element::kFloat32:
      return of_floats<float>(reduction);
    case Element::kFloat64:
      return of_floats<double>(reduction);
    case Element::kFloat16:
      return of_floats<Float16>(reduction);
    case Element::kBFloat16:
      return of_floats<BFloat16>(reduction);
    case Element::kInt8:
      return of_integers<std::int8_t>(reduction);
    case Element::kUInt8:
      return of_integers<std::uint8_t>(reduction);
    case Element::kInt16:
      return of_integers<std::int16_t>(reduction);
    case Element::kInt32:
      return of_integers<std::int32_t>(reduction);
    case Element::kInt64:
      return of_integers<std::int64_t>(reduction);
    case Element::kBool:
      return of_bools(reduction);
  }
  return nullptr;
}

}  // namespace
}  // namespace fastddp
