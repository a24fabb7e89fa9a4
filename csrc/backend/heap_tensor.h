#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/TensorOptions.h>

#include <cstdint>

namespace fastddp {

// Makes a tensor of `numel` elements in the heap that this process shares with its peers. Throws
// OutOfMemoryError where the heap has no room: ordinary memory would do. `rank` is for messages.
at::Tensor heap_tensor(int rank, std::int64_t numel, const at::TensorOptions& options);

}  // namespace fastddp
