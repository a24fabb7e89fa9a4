#pragma once

#include <Python.h>

namespace fastddp {

// Releases the GIL for as long as this lives, if this thread holds it. For code that joins threads
// which may want the GIL, and that runs in whoever drops the last reference: that may hold it.
class ReleasedGil {
 public:
  ReleasedGil()
      : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~ReleasedGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace fastddp
