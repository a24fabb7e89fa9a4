// From the dtypes of a pass to the types that its kernel or loop is instantiated for.
#pragma once

#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "kernels/arithmetic.h"

namespace fastddp {

template <typename T>
struct TypeTag {
  using Type = T;
};

template <typename Visit>
void with_narrow_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(TypeTag<float>{});
    case DType::kFloat16:
      return visit(TypeTag<KernelFloat16>{});
    case DType::kBFloat16:
      return visit(TypeTag<KernelBFloat16>{});
    case DType::kFloat64:
      return;  // not narrow, see with_types
  }
}

// Calls visit(TypeTag<Source>, TypeTag<Target>). Throws std::invalid_argument where there is no
// conversion.
template <typename Visit>
void with_types(DType source, DType target, Visit visit) {
  if (!converts(source, target))
    throw std::invalid_argument(std::string("no conversion from ") + name_of(source) + " to " +
                                name_of(target) + ": float64 only goes to float64");
  if (source == DType::kFloat64) return visit(TypeTag<double>{}, TypeTag<double>{});
  with_narrow_type(source,
                   [&](auto from) { with_narrow_type(target, [&](auto to) { visit(from, to); }); });
}

}  // namespace fastddp
