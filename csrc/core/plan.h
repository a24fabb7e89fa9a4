// Which gradient lies in which bucket, at which offset, and in which order the buckets are reduced.
//
// A plan is a pure function of the parameters' sizes, the order in which their gradients arrive and
// the size caps, so ranks that agree on these agree on every collective. `fastddp/engine/plan.py`
// is the same function in Python and the two are compared in tests/unit/test_plan.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fastddp {

// Slots begin at multiples of this, so that a wide load never straddles two gradients.
inline constexpr std::int64_t kSlotAlignBytes = 16;
// The same for a buffer of gradients that are cast to half their size for communication: what is
// aligned to 32 bytes there is aligned to 16 bytes after the cast.
constexpr std::int64_t slot_align_bytes(bool is_cast) {
  return is_cast ? 2 * kSlotAlignBytes : kSlotAlignBytes;
}
// For a communication hook, which gets a buffer that holds gradients and no padding.
inline constexpr std::int64_t kPackedAlignBytes = 1;

struct ParamSpec {
  std::int64_t numel;          // real elements: a complex parameter counts two for each
  std::int64_t element_bytes;  // size of one real element
  std::int64_t kind;  // parameters share a bucket only when they are of the same kind (dtype)
};

struct SlotPlan {
  std::int64_t param;   // index into the parameters
  std::int64_t offset;  // in elements from the bucket's start
  std::int64_t numel;

  bool operator==(const SlotPlan&) const = default;
};

struct BucketPlan {
  std::int64_t kind;
  std::vector<SlotPlan> slots;  // in arrival order
  std::int64_t flags_offset;    // one element per slot, in slot order
  std::int64_t numel;           // slots, their padding, the flags, and the marks behind them

  bool operator==(const BucketPlan&) const = default;
};

// Returns the buckets in the order in which they are launched, which is the order in which they
// fill when gradients arrive in `order`.
//
// `order` has to be a permutation of the parameters, and `caps_bytes` must not be empty, or this
// throws std::invalid_argument. The k-th bucket of a kind is closed once it holds caps_bytes[k]
// bytes; the last entry serves all further buckets. Slots begin at multiples of `align_bytes`, or
// of an element if that is larger.
//
// Buckets in the reverse order of forward, and their overlap with backward, are the idea of Li et
// al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
std::vector<BucketPlan> plan_buckets(const std::vector<ParamSpec>& params,
                                     const std::vector<std::int64_t>& order,
                                     const std::vector<std::int64_t>& caps_bytes,
                                     std::int64_t align_bytes = kSlotAlignBytes);

}  // namespace fastddp
