// From torch's element types to those of this library.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/dtype.h"

namespace fastddp {

// Returns the type of the real elements, also of a complex type. Returns nothing for types that
// gradients here cannot have.
inline std::optional<DType> dtype_of(at::ScalarType dtype) {
  switch (c10::toRealValueType(dtype)) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

}  // namespace fastddp
