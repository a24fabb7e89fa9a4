#include "core/half.h"
#include "kernels/flatten.h"

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

template <typename T>
void copy(void* dst_bytes, const void* src_bytes, std::size_t numel, double scale) {
  using A = Arithmetic<T>;
  auto* dst = static_cast<T*>(dst_bytes);
  const auto* src = static_cast<const T*>(src_bytes);
  const auto factor = static_cast<typename A::Compute>(scale);
  for (std::size_t i = 0; i < numel; ++i) dst[i] = A::store(A::load(src[i]) * factor);
}

template <typename T>
void add(void* dst_bytes, const void* src_bytes, std::size_t numel, double scale) {
  using A = Arithmetic<T>;
  auto* dst = static_cast<T*>(dst_bytes);
  const auto* src = static_cast<const T*>(src_bytes);
  const auto factor = static_cast<typename A::Compute>(scale);
  for (std::size_t i = 0; i < numel; ++i) {
    const T scaled = A::store(A::load(src[i]) * factor);
    dst[i] = A::store(A::load(dst[i]) + A::load(scaled));
  }
}

}  // namespace

void scale_copy(DType dtype, void* dst, const void* src, std::size_t numel, double scale) {
  switch (dtype) {
    case DType::kFloat32:
      return copy<float>(dst, src, numel, scale);
    case DType::kFloat64:
      return copy<double>(dst, src, numel, scale);
    case DType::kFloat16:
      return copy<Float16>(dst, src, numel, scale);
    case DType::kBFloat16:
      return copy<BFloat16>(dst, src, numel, scale);
  }
}

void scale_add(DType dtype, void* dst, const void* src, std::size_t numel, double scale) {
  switch (dtype) {
    case DType::kFloat32:
      return add<float>(dst, src, numel, scale);
    case DType::kFloat64:
      return add<double>(dst, src, numel, scale);
    case DType::kFloat16:
      return add<Float16>(dst, src, numel, scale);
    case DType::kBFloat16:
      return add<BFloat16>(dst, src, numel, scale);
  }
}

}  // namespace fastddp
