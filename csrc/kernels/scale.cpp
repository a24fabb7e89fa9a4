#include "kernels/scale.h"

#include <type_traits>

#include "kernels/dtype_pairs.h"

namespace fastddp {
namespace {

template <typename To, typename From>
void copy(To* dst, const From* src, std::size_t numel, double scale) {
  const auto factor = static_cast<ComputeOf<From>>(scale);
  for (std::size_t i = 0; i < numel; ++i)
    dst[i] = Arithmetic<To>::round(Arithmetic<From>::widen(src[i]) * factor);
}

template <typename To, typename From>
void add(To* dst, const From* src, std::size_t numel, double scale) {
  const auto factor = static_cast<ComputeOf<From>>(scale);
  for (std::size_t i = 0; i < numel; ++i) {
    auto product = Arithmetic<From>::widen(src[i]) * factor;
    if constexpr (std::is_same_v<To, From>)
      product = Arithmetic<To>::widen(Arithmetic<To>::round(product));
    dst[i] = Arithmetic<To>::round(Arithmetic<To>::widen(dst[i]) + product);
  }
}

}  // namespace

ScaleLoop copy_loop(DType to, DType from) {
  ScaleLoop loop = nullptr;
  with_types(from, to, [&loop](auto source, auto target) {
    using From = typename decltype(source)::Type;
    using To = typename decltype(target)::Type;
    loop = [](void* dst, const void* src, std::size_t numel, double scale) {
      copy(static_cast<To*>(dst), static_cast<const From*>(src), numel, scale);
    };
  });
  return loop;
}

ScaleLoop add_loop(DType to, DType from) {
  ScaleLoop loop = nullptr;
  with_types(from, to, [&loop](auto source, auto target) {
    using From = typename decltype(source)::Type;
    using To = typename decltype(target)::Type;
    loop = [](void* dst, const void* src, std::size_t numel, double scale) {
      add(static_cast<To*>(dst), static_cast<const From*>(src), numel, scale);
    };
  });
  return loop;
}

void scale_copy(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale) {
  copy_loop(to, from)(dst, src, numel, scale);
}

void scale_add(DType to, void* dst, DType from, const void* src, std::size_t numel, double scale) {
  add_loop(to, from)(dst, src, numel, scale);
}

}  // namespace fastddp
