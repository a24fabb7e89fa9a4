#include "kernels/reduce.h"
namespace fastddp {
namespace { void sum(void* const* d, std::size_t nd, const void* const* s, std::size_t ns, std::size_t n, double) {
 for (std::size_t i=0;i<n;++i){ float v=static_cast<const float*>(s[0])[i]; for(std::size_t k=1;k<ns;++k) v+=static_cast<const float*>(s[k])[i]; for(std::size_t k=0;k<nd;++k) static_cast<float*>(d[k])[i]=v; } } }
Reduce find_reduce(Element e, Reduction r) { return e==Element::kFloat32 && r==Reduction::kSum ? sum : nullptr; }
}
