// Torch's names for element types and for reductions, and those of the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <optional>

#include "kernels/reduce.h"

namespace fastddp {

// None for a type that no kernel reduces.
inline std::optional<Element> element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kDouble:
      return Element::kFloat64;
    case at::kHalf:
      return Element::kFloat16;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kChar:
      return Element::kInt8;
    case at::kByte:
      return Element::kUInt8;
    case at::kShort:
      return Element::kInt16;
    case at::kInt:
      return Element::kInt32;
    case at::kLong:
      return Element::kInt64;
    case at::kBool:
      return Element::kBool;
    default:
      return std::nullopt;
  }
}

inline at::ScalarType torch_dtype_of(Element element) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kChar,
                                     at::kByte, at::kShort, at::kInt, at::kLong}) {
    if (element_of(dtype) == element) return dtype;
  }
  return at::kBool;
}

// None for an operation that no kernel has.
inline std::optional<Reduction> reduction_of(const c10d::ReduceOp& op) {
  using Op = c10d::ReduceOp;
  switch (static_cast<Op::RedOpType>(op)) {
    case Op::SUM:
      return Reduction::kSum;
    case Op::AVG:
      return Reduction::kAvg;
    case Op::PRODUCT:
      return Reduction::kProduct;
    case Op::MIN:
      return Reduction::kMin;
    case Op::MAX:
      return Reduction::kMax;
    case Op::BAND:
      return Reduction::kBand;
    case Op::BOR:
      return Reduction::kBor;
    case Op::BXOR:
      return Reduction::kBxor;
    default:
      return std::nullopt;
  }
}

// The operation by which hosts combine what each of them has reduced.
inline c10d::ReduceOp::RedOpType torch_op_across_hosts(Reduction reduction) {
  using Op = c10d::ReduceOp;
  switch (reduction) {
    case Reduction::kSum:
    case Reduction::kAvg:  // divided once all hosts are in it
      return Op::SUM;
    case Reduction::kProduct:
      return Op::PRODUCT;
    case Reduction::kMin:
      return Op::MIN;
    case Reduction::kMax:
      return Op::MAX;
    case Reduction::kBand:
      return Op::BAND;
    case Reduction::kBor:
      return Op::BOR;
    case Reduction::kBxor:
      return Op::BXOR;
  }
  return Op::UNUSED;
}

}  // namespace fastddp
