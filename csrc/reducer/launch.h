// What a round launches: buckets in the order of the plan, then sparse gradients, then the flags
// that travel in no bucket.
//
// Invariant: every rank launches all of them in every round, also those that it has no gradient
// for. Ranks therefore stay in step when they use different parameters or when one of them raises.
// (tests/parity/test_interrupted_backward.py)
#pragma once

#include <cstddef>
#include <functional>

namespace fastddp {

// Returns once a collective has ended, and throws what has gone wrong with it.
using Wait = std::function<void()>;

enum class LaunchKind { kBucket, kSparse, kFlags };

struct LaunchId {
  LaunchKind kind = LaunchKind::kFlags;
  std::size_t index = 0;   // of the bucket in the plan, or of the parameter with a sparse gradient
  std::size_t number = 0;  // among all that a round launches
};

// A collective that is under way.
struct Launch {
  LaunchId id;
  Wait wait;  // empty once a hook's bucket has been waited for
};

// How the launches of a round are numbered.
struct LaunchNumbers {
  std::size_t num_buckets = 0;
  std::size_t num_dense = 0;  // parameters, which come first
  std::size_t num_params = 0;

  LaunchId of_bucket(std::size_t index) const { return {LaunchKind::kBucket, index, index}; }
  LaunchId of_sparse(std::size_t param) const {
    return {LaunchKind::kSparse, param, num_buckets + param - num_dense};
  }
  LaunchId of_flags() const { return {LaunchKind::kFlags, 0, num_gradients()}; }
  // How many launches carry gradients: all but the flags.
  std::size_t num_gradients() const { return num_buckets + num_params - num_dense; }
};

}  // namespace fastddp
