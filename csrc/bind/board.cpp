// The board, slow waits, and the signals that end them.
#include <Python.h>  // first, says its manual

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "bind/bind.h"
#include "core/board.h"
#include "core/events.h"
#include "core/slow_wait.h"

namespace py = pybind11;

namespace fastddp {
namespace {

// What a signal handler of the script has raised, on its way through C++.
class PythonInterruption final : public py::error_already_set, public Interruption {
 public:
  explicit PythonInterruption(std::string name) : name_(std::move(name)) {}
  std::string name() const override { return name_; }

 private:
  const std::string name_;
};

// Python runs signal handlers in the main thread only, and there only between two instructions of
// its own: never during a wait in C++.
void check_signals() {
  if (::syscall(SYS_gettid) != ::getpid() || !Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  if (PyErr_Occurred() != nullptr) return;  // the wait is within the handling of another error
  if (PyErr_CheckSignals() == 0) return;
  const auto* const type = reinterpret_cast<const PyTypeObject*>(PyErr_Occurred());
  board::note_interrupt();
  events::record(events::Kind::kInterrupted);
  throw PythonInterruption(type->tp_name);  // fetches the exception that is set
}

std::map<std::string, std::size_t> layout() {
  using namespace board;
  return {
      {"HEADER_WORDS", kHeaderWords},
      {"MODELS_AT", kModelsAt},
      {"MODEL_WORDS", kModelWords},
      {"MODELS", kModels},
      {"NATIVE_MODELS", kNativeModels},
      {"WAITS_AT", kWaitsAt},
      {"WAIT_WORDS", kWaitWords},
      {"WAITS", kWaits},
      {"NATIVE_WAITS", kNativeWaits},
      {"TEXT_BYTES", kTextBytes},
      {"WORDS", kWords},
      {"MAGIC", kMagicNumber},
      {"Header.ENDING", kEnding},
      {"Header.HAND_OVERS", kHandOvers},
      {"Model.CHANGED", kChanged},
      {"Wait.UNFINISHED", kUnfinished},
      {"Source.SCRIPT", static_cast<std::size_t>(Source::kScript)},
  };
}

}  // namespace

void bind_board(py::module_& m) {
  set_signal_check(&check_signals);
  m.def("board_layout", &layout);
  m.def(
      "board_group_id", [](const std::string& name) { return board::id_of(name); },
      py::arg("name"));
  m.def(
      "use_board", [](std::uintptr_t address) { board::use(reinterpret_cast<void*>(address)); },
      py::arg("address"));
  m.def("note_issuer", &board::note_issuer);
  m.def("fail_wait", &fail_wait, py::arg("place"), py::arg("since_ns"), py::arg("text"));
}

}  // namespace fastddp
