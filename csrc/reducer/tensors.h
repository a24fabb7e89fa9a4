// Sparse gradients, as the engine handles them. What other code needs of tensors too is in
// tensor/slot.h and tensor/layout.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "tensor/layout.h"

namespace fastddp {

// grad * scale, with one dimension of indices like an embedding's.
at::Tensor scale_sparse(const at::Tensor& grad, double scale);

// A sparse gradient without a single row, for a parameter of this layout.
at::Tensor empty_sparse(const Layout& like);

// Returns the bytes of the elements, and of a sparse tensor's indices.
std::uint64_t bytes_in(const at::Tensor& tensor);

}  // namespace fastddp
