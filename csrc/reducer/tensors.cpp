#include "reducer/tensors.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>

namespace fastddp {

at::Tensor scale_sparse(const at::Tensor& grad, double scale) {
  return at::mul(grad.is_sparse() ? grad : grad.to_sparse(1),
                 at::native::wrapped_scalar_tensor(scale));
}

at::Tensor empty_sparse(const Layout& like) {
  at::DimVector values_shape = like.sizes;
  values_shape.front() = 0;
  return at::sparse_coo_tensor(at::empty({1, 0}, like.options.dtype(at::kLong)),
                               at::empty(values_shape, like.options), like.sizes);
}

std::uint64_t bytes_in(const at::Tensor& tensor) {
  if (!tensor.is_sparse()) return tensor.nbytes();
  return tensor._indices().nbytes() + tensor._values().nbytes();
}

}  // namespace fastddp
