#pragma once

#include <stdexcept>

namespace fastddp::shm {

// Shared memory could not be set up, or a collective could not be finished.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// There is no shared memory left, but ordinary memory would do.
class NoRoom : public Error {
  using Error::Error;
};

}  // namespace fastddp::shm
