// The backend `shm`, and the addresses that ranks exchange to open each other's shared memory.
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "backend/shm_backend.h"
#include "bind/bind.h"
#include "shm/error.h"
#include "shm/heap.h"
#include "shm/label.h"

namespace py = pybind11;

namespace fastddp {

void bind_shm(py::module_& m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::register_exception<shm::Error>(m, "ShmError", PyExc_RuntimeError);
  py::class_<shm::Address>(m, "ShmAddress")
      .def(py::init([](pid_t pid, int fd, std::uint64_t bytes, std::uint64_t high,
                       std::uint64_t low) { return shm::Address{pid, fd, bytes, {high, low}}; }),
           py::arg("pid"), py::arg("fd"), py::arg("bytes"), py::arg("high"), py::arg("low"))
      .def("parts", [](const shm::Address& address) {
        return std::make_tuple(address.pid, address.fd, address.bytes, address.nonce.high,
                               address.nonce.low);
      });
  py::class_<shm::Segment>(m, "ShmSegment").def("address", &shm::Segment::address);
  m.def("shm_heap", [] { return shm::Heap::mine().address(); }, without_gil);
  m.def("shm_heap_used", [] { return shm::Heap::mine().used(); }, without_gil);
  m.def("set_label", &shm::Label::set, py::arg("label"));
  m.def("name_owner", &shm::name_owner, py::arg("owner"), py::arg("text"));
  m.def("shm_control", &ShmBackend::make_control, py::arg("ranks"), without_gil);
  py::class_<ShmBackend, c10d::Backend, c10::intrusive_ptr<ShmBackend>>(m, "ShmBackend")
      .def(py::init([](int rank, int size, c10::intrusive_ptr<c10d::Backend> inner,
                       std::vector<int> ranks, std::vector<shm::Address> heaps,
                       const shm::Address& control, double timeout_s, std::string name) {
             return c10::make_intrusive<ShmBackend>(
                 rank, size, std::move(inner),
                 LocalRanks{std::move(ranks), std::move(heaps), control, std::move(name)},
                 std::chrono::milliseconds(static_cast<std::int64_t>(timeout_s * 1000)));
           }),
           py::arg("rank"), py::arg("size"), py::arg("inner"), py::arg("ranks"), py::arg("heaps"),
           py::arg("control"), py::arg("timeout_s"), py::arg("name"), without_gil)
      .def("_set_default_timeout", &ShmBackend::setTimeout, py::arg("timeout"), without_gil)
      .def(
          "set_lanes",
          [](ShmBackend& self, std::int64_t count, std::vector<int> ranks,
             c10::intrusive_ptr<c10d::Backend> backend) {
            self.set_lanes({count, std::move(ranks), std::move(backend)});
          },
          py::arg("count"), py::arg("ranks"), py::arg("backend"))
      .def_property_readonly("is_idle", py::cpp_function(&ShmBackend::is_idle,
                                                         py::call_guard<py::gil_scoped_release>()))
      .def_property_readonly("spans_hosts", &ShmBackend::spans_hosts);
}

}  // namespace fastddp
