// What is fixed for the life of a reducer, and known to all of the parts that it consists of.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

#include "core/events.h"
#include "reducer/group.h"

namespace fastddp {

// The model that a reducer averages the gradients of.
struct Owner {
  std::uint32_t number = 0;  // tells its collectives from another's on the group
  std::string title = "the model";
};

// Every part of a reducer holds a reference to this, and reads it only.
struct Context {
  const Owner owner;
  const Group group;
  const c10::Device device;  // of all parameters
  // Whether buckets are allocated within a round, and left to the script when it ends.
  const bool lazy;
  // Whether a collective that is waited for at once costs no switch of threads.
  const bool runs_inline;

  int rank() const { return group.rank(); }

  // Records an event of this model.
  void record(events::Kind kind, std::uint64_t a = 0, std::uint64_t b = 0) const {
    events::record(kind, owner.number, a, b);
  }
};

}  // namespace fastddp
