#include "kernels/reduce.h"

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "kernels/reduce_isa.h"
// Last: see there.
#include "kernels/reduce_body.h"

namespace fastddp {

const std::vector<Isa>& usable_isas() {
  static const auto& usable = *new std::vector<Isa>([] {
    std::vector<Isa> isas{Isa::kPlain};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
      isas.push_back(Isa::kAvx2);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        isas.push_back(Isa::kAvx512);
    }
#endif
    return isas;
  }());
  return usable;
}

Reduce find_reduce(Element element, Reduction reduction, Isa isa) {
  switch (isa) {
    case Isa::kPlain:
      return find(element, reduction);
    case Isa::kAvx2:
      return find_reduce_avx2(element, reduction);
    case Isa::kAvx512:
      return find_reduce_avx512(element, reduction);
  }
  return nullptr;
}

Reduce find_reduce(Element element, Reduction reduction) {
  return find_reduce(element, reduction, usable_isas().back());
}

}  // namespace fastddp
