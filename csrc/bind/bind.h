// The parts of the Python module `fastddp._C`. bind_<name>() is in <name>.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastddp {

void bind_board(pybind11::module_& m);
void bind_events(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_reducer(pybind11::module_& m);
void bind_shm(pybind11::module_& m);

}  // namespace fastddp
