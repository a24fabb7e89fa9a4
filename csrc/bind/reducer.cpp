// The C++ engine, and the Python callables that it calls back.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bind/bind.h"
#include "reducer/reducer.h"

namespace py = pybind11;

namespace fastddp {
namespace {

// A Python callable that may be called, copied and freed without the GIL.
class PythonCallable {
 public:
  explicit PythonCallable(py::object callable)
      : callable_(new py::object(std::move(callable)), [](py::object* object) {
          if (!Py_IsInitialized()) return;  // the reducer outlives Python: leak the callable
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
    const PythonCallable wait(
        (*callable_)(input.index, input.count, input.buffer, input.params, input.offsets));
    return [wait] { wait.call(); };
  }

 private:
  std::shared_ptr<py::object> callable_;
};

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

void set_hook(Reducer& reducer, py::object hook, py::object let_go) {
  const PythonCallable callable(std::move(hook));
  const PythonCallable release(std::move(let_go));
  const py::gil_scoped_release no_gil;
  reducer.set_hook([callable](const HookInput& input) { return callable.start(input); },
                   [release] { release.call(); });
}

void set_after_round(Reducer& reducer, std::optional<py::object> callback) {
  std::function<void()> function;
  if (callback) function = [callable = PythonCallable(std::move(*callback))] { callable.call(); };
  const py::gil_scoped_release no_gil;
  reducer.set_after_round(std::move(function));
}

void set_on_news(Reducer& reducer, py::object callback) {
  const PythonCallable callable(std::move(callback));
  const py::gil_scoped_release no_gil;
  reducer.set_on_news([callable](News news) { callable.call(static_cast<int>(news)); });
}

py::dict stats_of(const Reducer& reducer) {
  using namespace py::literals;
  Stats stats;
  {
    const py::gil_scoped_release no_gil;
    stats = reducer.stats();
  }
  return py::dict("rounds"_a = stats.rounds, "wait_us_total"_a = stats.wait_us_total,
                  "wait_us_last"_a = stats.wait_us_last,
                  "bytes_per_round"_a = stats.bytes_per_round, "num_buckets"_a = stats.num_buckets,
                  "overlaps"_a = stats.overlaps, "began_ns"_a = stats.began_ns,
                  "backward_us_last"_a = stats.backward_us_last,
                  "comm_us_last"_a = stats.comm_us_last,
                  "unused_bytes_last"_a = stats.unused_bytes_last, "is_static"_a = stats.is_static);
}

}  // namespace

void bind_reducer(py::module_& m) {
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
      .def_property_readonly(
          "rounds",
          py::cpp_function([](const Reducer& self) { return self.stats().rounds; }, without_gil))
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
      .def("stats", &stats_of)
      .def("plan", &Reducer::plan, without_gil);
}

}  // namespace fastddp
