#include "kernels/scale.h"

#include <type_traits>

#include "core/half.h"

namespace fastddp {
namespace {

// How each element type is read into and written from the type it is computed in.
template <typename T>
struct Arithmetic {
  using Compute = T;
  static T load(T value) { return value; }
  static T store(T value) { return value; }
};

template <>
struct Arithmetic<BFloat16> {
  using Compute = float;
  static float load(BFloat16 value) { return to_float(value); }
  static BFloat16 store(float value) { return to_bfloat16(value); }
};

template <>
struct Arithmetic<Float16> {
  using Compute = float;
  static float load(Float16 value) { return to_float(value); }
  static Float16 store(float value) { return to_float16(value); }
};

struct Copy {
  template <typename To, typename From>
  static void run(To* dst, const From* src, std::size_t numel, double scale) {
    const auto factor = static_cast<typename Arithmetic<From>::Compute>(scale);
    for (std::size_t i = 0; i < numel; ++i)
      dst[i] = Arithmetic<To>::store(Arithmetic<From>::load(src[i]) * factor);
  }
};

struct Add {
  template <typename To, typename From>
  static void run(To* dst, const From* src, std::size_t numel, double scale) {
    const auto factor = static_cast<typename Arithmetic<From>::Compute>(scale);
    for (std::size_t i = 0; i < numel; ++i) {
      auto product = Arithmetic<From>::load(src[i]) * factor;
      if constexpr (std::is_same_v<To, From>)
        product = Arithmetic<To>::load(Arithmetic<To>::store(product));
      dst[i] = Arithmetic<To>::store(Arithmetic<To>::load(dst[i]) + product);
    }
  }
};

template <typename Loop, typename From>
void run_to(DType to, void* dst, const void* src, std::size_t numel, double scale) {
  const auto* from = static_cast<const From*>(src);
  switch (to) {
    case DType::kFloat32:
      return Loop::run(static_cast<float*>(dst), from, numel, scale);
    case DType::kFloat16:
      return Loop::run(static_cast<Float16*>(dst), from, numel, scale);
    case DType::kBFloat16:
      return Loop::run(static_cast<BFloat16*>(dst), from, numel, scale);
    case DType::kFloat64:
      return;  // excluded by converts()
  }
}

template <typename Loop>
void run(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale) {
  switch (from) {
    case DType::kFloat32:
      return run_to<Loop, float>(to, dst, src, numel, scale);
    case DType::kFloat16:
      return run_to<Loop, Float16>(to, dst, src, numel, scale);
    case DType::kBFloat16:
      return run_to<Loop, BFloat16>(to, dst, src, numel, scale);
    case DType::kFloat64:
      return Loop::run(static_cast<double*>(dst), static_cast<const double*>(src), numel, scale);
  }
}

}  // namespace

void scale_copy(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale) {
  run<Copy>(to, dst, from, src, numel, scale);
}

void scale_add(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale) {
  run<Add>(to, dst, from, src, numel, scale);
}

}  // namespace fastddp
