// What one collective of a round reduces: a bucket of the plan, or the flags that travel in none.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/plan.h"
#include "reducer/launch.h"
#include "reducer/parameters.h"

namespace fastddp {

using Plan = std::vector<BucketPlan>;

// How buckets are laid out, which follows from how they are sent.
struct Form {
  // Whether a bucket holds nothing but gradients, without gaps and row after row, as a
  // communication hook is promised. The flags then travel apart from the buckets.
  bool packs = false;
  // What gradients of up to 32 bits are cast to for the reduction, if that is given.
  std::optional<at::ScalarType> comm_dtype;

  // The multiples at which slots begin.
  std::int64_t align_bytes() const {
    return packs ? kPackedAlignBytes : slot_align_bytes(comm_dtype.has_value());
  }
  // The dtype in which gradients of `dtype` are reduced.
  at::ScalarType wire_dtype(at::ScalarType dtype) const {
    return dtype == at::kDouble ? dtype : comm_dtype.value_or(dtype);
  }
};

// All that belongs to one bucket. The flags that travel in no bucket are in one of these too.
struct Bucket {
  // Brings what was reduced in another dtype to where gradients are.
  void cast_back() const;
  // Whether flags and marks travel in its tail, and not in a collective of their own.
  bool carries_flags() const { return marks.defined(); }

  const BucketPlan* plan = nullptr;  // none for the flags that travel in no bucket
  LaunchId id;
  at::Tensor flat;       // what the slots are in
  at::Tensor wire;       // what is reduced: `flat` itself unless there is a dtype for communication
  at::Tensor flags;      // in the tail; or a part of the flags that travel in no bucket
  at::Tensor marks;      // behind the flags; undefined if these travel in no bucket
  at::Tensor gradients;  // the part of `flat` that a hook is given
  at::Tensor ones;       // one per slot, to set flags from in a fused pass
  at::Tensor sent_marks;            // to set marks from
  std::size_t references = 0;       // to the memory of `flat`, from in here
  std::optional<c10::Stream> home;  // that it was allocated on
};

// The marks of one collective, as it has reduced them.
struct Marked {
  LaunchId id;
  at::Tensor marks;
};

// What a collective carries, for messages.
std::string describe(const LaunchId& id, const Plan& plan, const Parameters& params);

}  // namespace fastddp
