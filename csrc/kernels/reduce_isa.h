// One entry for each instruction set; null where it is not compiled.
#pragma once

#include "kernels/reduce.h"

namespace fastddp {

using FindReduce = Reduce (*)(Element, Reduction);

extern const FindReduce find_reduce_avx2;
extern const FindReduce find_reduce_avx512;

}  // namespace fastddp
