// A parameter's shape, strides, dtype and device as they were at one time.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

namespace fastddp {

struct Layout {
  Layout() = default;
  explicit Layout(const at::Tensor& param)
      : sizes(param.sizes()),
        strides(param.strides()),
        options(param.options().requires_grad(false)),
        is_dense(param.is_non_overlapping_and_dense()) {}

  bool is_that_of(const at::Tensor& param) const {
    return param.scalar_type() == c10::typeMetaToScalarType(options.dtype()) &&
           param.sizes() == at::IntArrayRef(sizes) && param.strides() == at::IntArrayRef(strides) &&
           param.device() == options.device();
  }

  at::DimVector sizes;
  at::DimVector strides;
  at::TensorOptions options;
  bool is_dense = true;
};

}  // namespace fastddp
