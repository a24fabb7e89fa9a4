// The Python module `fastddp._C`: convert, call, return. `fastddp/_C.pyi` is its stub.
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "backend/shm_backend.h"
#include "kernels/scale.h"
#include "reducer/reducer.h"
#include "shm/error.h"
#include "shm/heap.h"
#include "shm/label.h"
#include "tensor/dtype.h"
#include "tensor/flatten.h"
#include "tensor/keep_memory.h"

namespace py = pybind11;

namespace fastddp {
namespace {

using Kernel = void (*)(DType, void*, DType, const void*, std::size_t, double);

// Makes a kernel callable on two contiguous CPU tensors, for its tests.
auto on_tensors(Kernel kernel) {
  return [kernel](const at::Tensor& dst, const at::Tensor& src, double scale) {
    TORCH_CHECK_VALUE(dst.is_cpu() && src.is_cpu() && dst.is_contiguous() && src.is_contiguous() &&
                          dst.sizes() == src.sizes(),
                      "expected two contiguous CPU tensors of one shape");
    const auto to = dtype_of(dst.scalar_type()), from = dtype_of(src.scalar_type());
    TORCH_CHECK_TYPE(to && from && !dst.is_complex() && !src.is_complex() && converts(*from, *to),
                     "expected floating point tensors, float64 for float64, got ",
                     dst.scalar_type(), " and ", src.scalar_type());
    kernel(*to, dst.data_ptr(), *from, src.const_data_ptr(), static_cast<std::size_t>(dst.numel()),
           scale);
  };
}

// Contiguous tensors of one dtype on the flat buffer's device, each with its place in the buffer.
std::vector<FlatPiece> pieces_of(const at::Tensor& flat,
                                 const std::vector<at::Tensor>& tensors,
                                 const std::vector<std::int64_t>& offsets) {
  TORCH_CHECK_VALUE(flat.is_contiguous() && flat.dim() == 1 && tensors.size() == offsets.size() &&
                        !tensors.empty(),
                    "expected a flat buffer, and an offset for each of at least one tensor");
  std::vector<FlatPiece> pieces;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    TORCH_CHECK_VALUE(tensor.is_contiguous() && !tensor.is_complex() && !tensor.is_neg() &&
                          tensor.device() == flat.device() &&
                          tensor.scalar_type() == tensors.front().scalar_type() &&
                          offsets[i] >= 0 && offsets[i] <= flat.numel() - tensor.numel(),
                      "tensor ", i,
                      " is not contiguous, not like the others in dtype and device, "
                      "or has no room at offset ",
                      offsets[i]);
    pieces.push_back({tensor, offsets[i], tensor.numel()});
  }
  return pieces;
}

void flatten_tensors(const at::Tensor& flat,
                     const std::vector<at::Tensor>& tensors,
                     const std::vector<std::int64_t>& offsets,
                     double scale,
                     const std::optional<at::Tensor>& moments) {
  TORCH_CHECK_VALUE(
      !moments || (moments->is_contiguous() && moments->numel() == 2 &&
                   moments->scalar_type() == at::kDouble && moments->device() == flat.device()),
      "expected moments of two float64 elements, one after the other");
  flatten(flat, pieces_of(flat, tensors, offsets), tensors.front().scalar_type(), scale,
          moments.value_or(at::Tensor()));
}

void unflatten_tensors(const at::Tensor& flat,
                       const std::vector<at::Tensor>& tensors,
                       const std::vector<std::int64_t>& offsets,
                       double scale) {
  unflatten(flat, pieces_of(flat, tensors, offsets), tensors.at(0).scalar_type(), scale);
}

std::shared_ptr<Reducer> make_reducer(std::vector<at::Tensor> params,
                                      std::vector<std::string> names,
                                      std::size_t num_sparse,
                                      std::vector<at::Tensor> frozen,
                                      const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                                      std::vector<std::int64_t> caps_bytes,
                                      std::optional<at::ScalarType> comm_dtype,
                                      std::optional<bool> flattens,
                                      std::uint32_t owner,
                                      std::string title,
                                      bool lazy) {
  auto reducer = std::make_shared<Reducer>(
      std::move(params), std::move(names), num_sparse, std::move(frozen), group,
      std::move(caps_bytes), comm_dtype, flattens, lazy, Owner{owner, std::move(title)});
  reducer->attach();
  return reducer;
}

// A Python callable that may be called, copied and freed without the GIL.
class WithoutGil {
 public:
  explicit WithoutGil(py::object callable)
      : callable_(new py::object(std::move(callable)), [](py::object* object) {
          if (!Py_IsInitialized()) return;  // a reducer that outlives Python: nobody frees it
          const py::gil_scoped_acquire gil;
          delete object;
        }) {}

  template <typename... Args>
  void call(Args... args) const {
    const py::gil_scoped_acquire gil;
    (*callable_)(args...);
  }

  Wait start(const HookInput& input) const {
    const py::gil_scoped_acquire gil;
    const WithoutGil wait(
        (*callable_)(input.index, input.count, input.buffer, input.params, input.offsets));
    return [wait] { wait.call(); };
  }

 private:
  std::shared_ptr<py::object> callable_;
};

void set_hook(Reducer& reducer, py::object hook, py::object let_go) {
  const WithoutGil callable(std::move(hook));
  const WithoutGil release(std::move(let_go));
  const py::gil_scoped_release no_gil;
  reducer.set_hook([callable](const HookInput& input) { return callable.start(input); },
                   [release] { release.call(); });
}

void set_after_round(Reducer& reducer, std::optional<py::object> callback) {
  std::function<void()> function;
  if (callback) function = [callable = WithoutGil(std::move(*callback))] { callable.call(); };
  const py::gil_scoped_release no_gil;
  reducer.set_after_round(std::move(function));
}

void set_on_news(Reducer& reducer, py::object callback) {
  const WithoutGil callable(std::move(callback));
  const py::gil_scoped_release no_gil;
  reducer.set_on_news([callable](News news) { callable.call(static_cast<int>(news)); });
}

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
                       const shm::Address& control, double timeout_s) {
             return c10::make_intrusive<ShmBackend>(
                 rank, size, std::move(inner),
                 LocalRanks{std::move(ranks), std::move(heaps), control},
                 std::chrono::milliseconds(static_cast<std::int64_t>(timeout_s * 1000)));
           }),
           py::arg("rank"), py::arg("size"), py::arg("inner"), py::arg("ranks"), py::arg("heaps"),
           py::arg("control"), py::arg("timeout_s"), without_gil)
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

}  // namespace
}  // namespace fastddp

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastddp;
  py::module_::import("torch.distributed");  // registers the type ProcessGroup

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

  m.attr("has_cuda") = kHasCuda;
  m.def("flatten", &flatten_tensors, py::arg("flat"), py::arg("tensors"), py::arg("offsets"),
        py::arg("scale"), py::arg("moments"), py::call_guard<py::gil_scoped_release>());
  m.def("unflatten", &unflatten_tensors, py::arg("flat"), py::arg("tensors"), py::arg("offsets"),
        py::arg("scale"), py::call_guard<py::gil_scoped_release>());
  m.def("scale_copy", on_tensors(&scale_copy), py::arg("dst"), py::arg("src"), py::arg("scale"));
  m.def("scale_add", on_tensors(&scale_add), py::arg("dst"), py::arg("src"), py::arg("scale"));

  m.def("keep_memory", &keep_memory, py::arg("on"), py::arg("patience_s") = kPatienceSeconds);
  m.def("release_memory", &release_memory, py::call_guard<py::gil_scoped_release>());
  py::class_<KeptMemory>(m, "KeptMemory")
      .def_readonly("in_use", &KeptMemory::in_use)
      .def_readonly("idle", &KeptMemory::idle)
      .def_readonly("peak", &KeptMemory::peak);
  m.def("kept_memory", &kept_memory);

  py::class_<Stats>(m, "Stats")
      .def_readonly("rounds", &Stats::rounds)
      .def_readonly("wait_us_total", &Stats::wait_us_total)
      .def_readonly("wait_us_last", &Stats::wait_us_last)
      .def_readonly("bytes_per_round", &Stats::bytes_per_round)
      .def_readonly("num_buckets", &Stats::num_buckets)
      .def_readonly("overlaps", &Stats::overlaps)
      .def_readonly("began_ns", &Stats::began_ns)
      .def_readonly("backward_us_last", &Stats::backward_us_last)
      .def_readonly("comm_us_last", &Stats::comm_us_last)
      .def_readonly("unused_bytes_last", &Stats::unused_bytes_last)
      .def_readonly("is_static", &Stats::is_static);

  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Reducer, std::shared_ptr<Reducer>>(m, "Reducer")
      .def(py::init(&make_reducer), py::arg("params"), py::arg("names"), py::arg("num_sparse"),
           py::arg("frozen"), py::arg("group"), py::arg("caps_bytes"),
           py::arg("comm_dtype") = py::none(), py::arg("flattens") = py::none(),
           py::arg("owner") = 0, py::arg("title") = "the model", py::arg("lazy") = false)
      .def_property("sync", &Reducer::sync, &Reducer::set_sync)
      .def_property("manual", &Reducer::manual, &Reducer::set_manual)
      .def("watch", &Reducer::watch, py::arg("outputs"))
      .def("set_divisor", &Reducer::set_divisor, py::arg("divisor"), without_gil)
      .def("set_hook", &set_hook, py::arg("hook"), py::arg("let_go"))
      .def("set_after_round", &set_after_round, py::arg("callback"))
      .def("set_on_news", &set_on_news, py::arg("callback"))
      .def_property_readonly("has_left_news",
                             py::cpp_function(&Reducer::has_left_news, without_gil))
      .def_property_readonly("began_ns", &Reducer::began_ns)
      .def("read_left_news", &Reducer::read_left_news, without_gil)
      .def("leave_news", &Reducer::leave_news, without_gil)
      .def("is_stale", &Reducer::is_stale, without_gil)
      .def("retire", &Reducer::retire, without_gil)
      .def("is_in_flight", &Reducer::is_in_flight)
      .def("finalize", &Reducer::finalize, without_gil)
      .def("average", &Reducer::average, without_gil)
      .def("outgrown", &Reducer::outgrown)
      .def("settle", &Reducer::settle, without_gil)
      .def("shadow", &Reducer::shadow, without_gil)
      .def("unused", &Reducer::unused, without_gil)
      .def("error", &Reducer::error, without_gil)
      .def("used_by", &Reducer::used_by, without_gil)
      .def("close", &Reducer::close, without_gil)
      .def("stats", &Reducer::stats, without_gil)
      .def("plan", &Reducer::plan, without_gil);

  bind_shm(m);
}
