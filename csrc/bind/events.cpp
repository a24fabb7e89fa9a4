// The ring of events, which Python makes and which both languages write to.
#include "core/events.h"

#include "bind/bind.h"

namespace py = pybind11;

namespace fastddp {

void bind_events(py::module_& m) {
  m.def(
      "use_events", [](std::uintptr_t address) { events::use(reinterpret_cast<void*>(address)); },
      py::arg("address"));
  m.def(
      "record_event",
      [](std::uint8_t kind, std::uint32_t owner, std::uint64_t a, std::uint64_t b) {
        events::record(static_cast<events::Kind>(kind), owner, a, b);
      },
      py::arg("kind"), py::arg("owner"), py::arg("a"), py::arg("b"));
}

}  // namespace fastddp
