// Counts the gradients that arrive and says which buckets may be launched.
//
// Invariant: buckets are launched in plan order whatever order they fill in. Ranks fill them in
// different orders; a collective launched out of order would be added to a different bucket of
// another rank. Guarded by tests/cpp/core_test.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/plan.h"

namespace fastddp {

class ReadyTracker {
 public:
  explicit ReadyTracker(const std::vector<BucketPlan>& plan);

  // Marks a slot of `bucket` as filled.
  void mark(std::size_t bucket) { --missing_[bucket]; }

  // Returns the next bucket to launch, whether full or not, or kNone after the last. Each bucket is
  // returned once.
  std::size_t pop();
  // Whether there is a next bucket and it is full.
  bool is_next_full() const { return next_ < missing_.size() && missing_[next_] == 0; }

  bool is_full(std::size_t bucket) const { return missing_[bucket] == 0; }
  bool launched(std::size_t bucket) const { return bucket < next_; }
  bool all_launched() const { return next_ == missing_.size(); }

  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

 private:
  std::vector<std::int64_t> missing_;  // per bucket, in plan order
  std::size_t next_ = 0;
};

inline ReadyTracker::ReadyTracker(const std::vector<BucketPlan>& plan) {
  missing_.reserve(plan.size());
  for (const BucketPlan& bucket : plan)
    missing_.push_back(static_cast<std::int64_t>(bucket.slots.size()));
}

inline std::size_t ReadyTracker::pop() { return next_ < missing_.size() ? next_++ : kNone; }

}  // namespace fastddp
