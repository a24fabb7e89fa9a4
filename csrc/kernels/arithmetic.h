// The element types as a kernel sees them, on the CPU and on a GPU: the type that each is computed
// in, how an element is widened to it, and how a result is rounded (to the nearest, ties to even).
//
// The .cu files are C++17 and use the 16-bit types of the toolkit; everything else uses those of
// core/half.h. Both round to the same bits, except that they make different NaNs of a NaN.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTDDP_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTDDP_UNROLL _Pragma("unroll")
#else
#include "core/half.h"
#define FASTDDP_HOST_DEVICE inline
#define FASTDDP_UNROLL
#endif

namespace fastddp {

template <typename T>
struct Arithmetic {
  using Compute = T;
  static FASTDDP_HOST_DEVICE T widen(T value) { return value; }
  static FASTDDP_HOST_DEVICE T round(T value) { return value; }
};

#if defined(__CUDACC__)

using KernelFloat16 = __half;
using KernelBFloat16 = __nv_bfloat16;

// The conversions are called by name because torch builds with the toolkit's implicit ones off.
template <>
struct Arithmetic<__half> {
  using Compute = float;
  static FASTDDP_HOST_DEVICE float widen(__half value) { return __half2float(value); }
  static FASTDDP_HOST_DEVICE __half round(float value) { return __float2half_rn(value); }
};

template <>
struct Arithmetic<__nv_bfloat16> {
  using Compute = float;
  static FASTDDP_HOST_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static FASTDDP_HOST_DEVICE __nv_bfloat16 round(float value) { return __float2bfloat16_rn(value); }
};

#else

using KernelFloat16 = Float16;
using KernelBFloat16 = BFloat16;

template <>
struct Arithmetic<Float16> {
  using Compute = float;
  static float widen(Float16 value) { return to_float(value); }
  static Float16 round(float value) { return to_float16(value); }
};

template <>
struct Arithmetic<BFloat16> {
  using Compute = float;
  static float widen(BFloat16 value) { return to_float(value); }
  static BFloat16 round(float value) { return to_bfloat16(value); }
};

#endif

template <typename T>
using ComputeOf = typename Arithmetic<T>::Compute;

}  // namespace fastddp
