// The version for any CPU, and the choice between it and the others.
#define REDUCE_TARGET
#define REDUCE_WIDTH 16
#include "kernels/reduce_body.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastddp {

#if defined(__x86_64__)
Reduce find_reduce_avx2(Element element, Reduction reduction);
Reduce find_reduce_avx512(Element element, Reduction reduction);
#endif

namespace {

std::vector<Isa> detect_isas() {
  std::vector<Isa> isas{Isa::kPlain};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the registers, but not every
  // compiler's knows F16C.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (__builtin_cpu_supports("avx2") && f16c) isas.push_back(Isa::kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && f16c)
    isas.push_back(Isa::kAvx512);
#endif
  return isas;
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect_isas();
  return isas;
}

Reduce find_reduce(Element element, Reduction reduction, Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return find_reduce_avx2(element, reduction);
    case Isa::kAvx512:
      return find_reduce_avx512(element, reduction);
#endif
    default:
      return find(element, reduction);
  }
}

Reduce find_reduce(Element element, Reduction reduction) {
  return find_reduce(element, reduction, available_isas().back());
}

}  // namespace fastddp
