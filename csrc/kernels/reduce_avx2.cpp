#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "kernels/reduce_isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define FASTDDP_F16C
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "kernels/reduce_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastddp {
const FindReduce find_reduce_avx2 = &find;
}  // namespace fastddp

#else

namespace fastddp {
const FindReduce find_reduce_avx2 = nullptr;
}  // namespace fastddp

#endif
