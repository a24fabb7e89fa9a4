#include "backend/operands.h"

#include <ATen/ops/view_as_real.h>
#include <torch/csrc/distributed/c10d/Utils.hpp>

#include "backend/dtypes.h"
#include "backend/particulars.h"

namespace fastddp {
namespace {

bool goes_as_pairs(const at::Tensor& tensor, const c10d::ReduceOp& op) {
  return tensor.is_complex() && c10d::isComplexViewAsRealAllowed(op);
}

shm::TypeName type_name(at::ScalarType dtype) {
  shm::TypeName name{};
  name_of(dtype).copy(name.data(), name.size());
  return name;
}

}  // namespace

bool can_move(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.is_cpu();
}

bool can_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op) {
  if (!can_move(tensor)) return false;
  const auto element =
      element_of(goes_as_pairs(tensor, op) ? c10::toRealValueType(tensor.scalar_type())
                                           : tensor.scalar_type());
  const auto reduction = reduction_of(op);
  return element && reduction && find_reduce(*element, *reduction) != nullptr;
}

at::Tensor as_real(const at::Tensor& tensor, const c10d::ReduceOp& op) {
  return goes_as_pairs(tensor, op) ? at::view_as_real(tensor) : tensor;
}

shm::Operand operand_of(const at::Tensor& tensor, at::ScalarType dtype) {
  const auto element = element_of(tensor.scalar_type());
  return {tensor.data_ptr(), element ? static_cast<std::size_t>(tensor.numel()) : tensor.nbytes(),
          element.value_or(Element::kUInt8),
          element && tensor.scalar_type() == dtype ? shm::TypeName{} : type_name(dtype)};
}

shm::Operand operand_of(const at::Tensor& tensor) {
  return operand_of(tensor, tensor.scalar_type());
}

}  // namespace fastddp
