// Tensors as operands of the collectives that go through shared memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include "shm/collectives.h"

namespace fastddp {

// Whether the elements can be moved, whatever they are: a strided tensor on the CPU.
bool can_move(const at::Tensor& tensor);

// Whether they can be reduced here, too.
bool can_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op);

// What there is to reduce: complex numbers as pairs where that is the same. Of a plain tensor.
at::Tensor as_real(const at::Tensor& tensor, const c10d::ReduceOp& op);

// Of a plain tensor, which may be the view as pairs of one of another `dtype`; a dtype without a
// name here goes as bytes.
shm::Operand operand_of(const at::Tensor& tensor, at::ScalarType dtype);
shm::Operand operand_of(const at::Tensor& tensor);

}  // namespace fastddp
