#if defined(__x86_64__)
#define REDUCE_TARGET __attribute__((target("avx2,f16c")))
#define REDUCE_WIDTH 32
#include "kernels/reduce_body.h"

namespace fastddp {

Reduce find_reduce_avx2(Element element, Reduction reduction) { return find(element, reduction); }

}  // namespace fastddp
#endif
