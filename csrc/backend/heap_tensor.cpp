#include "backend/heap_tensor.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <limits>

#include "shm/error.h"
#include "shm/heap.h"

namespace fastddp {

at::Tensor heap_tensor(int rank, std::int64_t numel, const at::TensorOptions& options) {
  const std::size_t element = c10::elementSize(c10::typeMetaToScalarType(options.dtype()));
  TORCH_CHECK_VALUE(numel >= 0, "fastddp: rank ", rank, ": a tensor of ", numel, " elements");
  const auto count = static_cast<std::size_t>(numel);
  TORCH_CHECK_WITH(OutOfMemoryError, count <= std::numeric_limits<std::size_t>::max() / element,
                   "fastddp: rank ", rank, ": no memory has room for ", numel, " elements of ",
                   element, " bytes");
  shm::Heap& heap = shm::Heap::mine();
  void* block = nullptr;
  try {
    block = heap.allocate(count * element);
  } catch (const shm::NoRoom& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "fastddp: rank ", rank, ": ", error.what());
  }
  return at::from_blob(
      block, {numel}, [&heap](void* memory) { heap.free(memory); }, options.device(at::kCPU));
}

}  // namespace fastddp
