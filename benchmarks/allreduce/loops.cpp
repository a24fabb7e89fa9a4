// The loops that `benchmarks.allreduce` times without Python between two calls.
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <cstdint>
#include <vector>

namespace {

template <typename Call>
double seconds(std::int64_t calls, const Call& call) {
  const auto start = std::chrono::steady_clock::now();
  for (std::int64_t k = 0; k < calls; ++k) {
    call();
    // Tells the compiler that memory may be read here. Else it could merge several passes into one.
    asm volatile("" ::: "memory");
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Sums `tensor` over the group's ranks in place, `calls` times in a row; returns the seconds.
double all_reduce(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                  const at::Tensor& tensor,
                  std::int64_t calls) {
  std::vector<at::Tensor> tensors{tensor};
  c10d::AllreduceOptions options;
  options.asyncOp = false;
  return seconds(calls, [&] {
    const auto work = group->allreduce(tensors, options);
    if (work) work->wait();
  });
}

// Computes d = s = d + s, `calls` times in a row; returns the seconds. The caller guarantees two
// contiguous float tensors of one length that do not overlap.
double add_into_both(const at::Tensor& first, const at::Tensor& second, std::int64_t calls) {
  float* __restrict d = first.mutable_data_ptr<float>();
  float* __restrict s = second.mutable_data_ptr<float>();
  const std::int64_t length = first.numel();
  return seconds(calls, [=] {
    for (std::int64_t i = 0; i < length; ++i) d[i] = s[i] = d[i] + s[i];
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  pybind11::module_::import("torch.distributed");  // registers ProcessGroup
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("all_reduce", &all_reduce, no_gil);
  module.def("add_into_both", &add_into_both, no_gil);
}
