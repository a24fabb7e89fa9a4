#if defined(__x86_64__)
#define REDUCE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
#define REDUCE_WIDTH 64
#include "kernels/reduce_body.h"

namespace fastddp {

Reduce find_reduce_avx512(Element element, Reduction reduction) { return find(element, reduction); }

}  // namespace fastddp
#endif
