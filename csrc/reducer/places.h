// Where the gradient of one parameter goes, and how it gets there.
//
// What the plan fixes is chosen when the plan is installed: the slot, and the loop for the two
// dtypes. A gradient that is like its parameter is then copied without another question about
// dtypes; any other goes the general way of tensor/slot.h, to the same bits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

#include "core/plan.h"
#include "kernels/scale.h"
#include "tensor/layout.h"

namespace fastddp {

struct Place {
  Place() = default;
  // The place of a parameter of this layout in a bucket: in `flat`, and in `wire` to be reduced.
  // `contiguous`: whether the slot is row after row, whatever strides the parameter has.
  Place(const at::Tensor& flat,
        const at::Tensor& wire,
        const SlotPlan& plan,
        const Layout& like,
        bool contiguous,
        at::Tensor flag);

  // sent = grad * scale
  void write(const at::Tensor& grad, double scale) const;
  // sent += grad * scale
  void add(const at::Tensor& grad, double scale) const;
  // sent = 0
  void clear() const;

  // The reduced gradient, shaped and strided like the parameter. A sparse gradient has no memory of
  // its own in a bucket: then this is what the round makes of it.
  at::Tensor slot;
  // Where a dense gradient lies to be reduced: the slot as real numbers, or the same part of the
  // bucket's `wire`.
  at::Tensor sent;
  at::Tensor flag;  // one element: whether any rank had a gradient

 private:
  // Whether the loops serve a gradient.
  bool is_served(const at::Tensor& grad) const;

  at::ScalarType dtype_ = at::kFloat;  // of the gradients that the loops take, as real numbers
  ScaleLoop copy_ = nullptr;           // null where there is none, as on a GPU
  ScaleLoop add_ = nullptr;
};

}  // namespace fastddp
