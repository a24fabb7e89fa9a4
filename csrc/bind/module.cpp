// The Python module `fastddp._C`. Functions here convert arguments, call and return; they hold no
// logic. `fastddp/_C.pyi` is the stub of the module.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bind/bind.h"
#include "core/plan.h"
#include "tensor/keep_memory.h"

namespace py = pybind11;

namespace fastddp {
namespace {

void bind_plan(py::module_& m) {
  py::class_<ParamSpec>(m, "ParamSpec")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t>(), py::arg("numel"),
           py::arg("element_bytes"), py::arg("kind"));
  py::class_<SlotPlan>(m, "SlotPlan")
      .def_readonly("param", &SlotPlan::param)
      .def_readonly("offset", &SlotPlan::offset)
      .def_readonly("numel", &SlotPlan::numel);
  py::class_<BucketPlan>(m, "BucketPlan")
      .def_readonly("kind", &BucketPlan::kind)
      .def_readonly("slots", &BucketPlan::slots)
      .def_readonly("flags_offset", &BucketPlan::flags_offset)
      .def_readonly("numel", &BucketPlan::numel);
  m.def("plan_buckets", &plan_buckets, py::arg("params"), py::arg("order"), py::arg("caps_bytes"),
        py::arg("align_bytes") = kSlotAlignBytes);
}

void bind_memory(py::module_& m) {
  m.def("keep_memory", &keep_memory, py::arg("on"), py::arg("patience_s") = kPatienceSeconds);
  m.def("release_memory", &release_memory, py::call_guard<py::gil_scoped_release>());
  py::class_<KeptMemory>(m, "KeptMemory")
      .def_readonly("in_use", &KeptMemory::in_use)
      .def_readonly("idle", &KeptMemory::idle)
      .def_readonly("peak", &KeptMemory::peak);
  m.def("kept_memory", &kept_memory);
}

}  // namespace
}  // namespace fastddp

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::module_::import("torch.distributed");  // registers the type ProcessGroup
  fastddp::bind_plan(m);
  fastddp::bind_board(m);
  fastddp::bind_events(m);
  fastddp::bind_kernels(m);
  fastddp::bind_memory(m);
  fastddp::bind_reducer(m);
  fastddp::bind_shm(m);
}
