// How what goes wrong in a collective reaches the caller.
#pragma once

#include <c10/util/Exception.h>

#include <exception>

#include "shm/error.h"

namespace fastddp {

// What another backend threw on every rank when it was called: the group is as it was.
struct RefusedByAll {
  std::exception_ptr error;
};

// Calls `body`, and has what the shared memory throws arrive as torch's exception.
template <typename Body>
void as_torch_error(const Body& body) {
  try {
    body();
  } catch (const shm::Error& error) {
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  }
}

}  // namespace fastddp
