// Memory that buckets lie in.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "reducer/context.h"

namespace fastddp {

// Zeroed, so that the padding between slots sums to zero for ever. In memory of the group's backend
// where that can allocate, else in torch's.
at::Tensor allocate(const Context& context, std::int64_t numel, at::ScalarType dtype);

}  // namespace fastddp
