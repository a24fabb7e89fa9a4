#include "reducer/memory.h"

#include <ATen/ATen.h>

namespace fastddp {

at::Tensor allocate(const Context& context, std::int64_t numel, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype).device(context.device);
  const auto group = context.group.get();
  try {
    const auto backend = group->getBackend(context.device.type());
    if (backend->supportsTensorAlloc(context.device.index()))
      return backend->allocateTensor(numel, options).zero_();
  } catch (const c10::OutOfMemoryError& error) {
    TORCH_WARN_ONCE(
        "fastddp: rank ", context.rank(), ": gradients are not in memory that the ranks share, ",
        "so reducing them takes several times as long: ", error.what_without_backtrace());
  } catch (const c10::Error&) {  // not ready for it, as NCCL before its first collective
  }
  return at::zeros({numel}, options);
}

}  // namespace fastddp
