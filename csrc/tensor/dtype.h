// From torch's names for element types to ours.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/dtype.h"

namespace fastddp {

// None for a type that gradients do not have here; for a complex type that of its parts.
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
