// An installed plan, and the memory of all of its buckets.
//
// Invariants, each with the test that guards it:
// * Memory is allocated at the head of a round only, and only when the plan is new or the script
//   still refers to gradients in a bucket, other than by `.grad`: then the bucket is left to it.
//   Lazy buckets are allocated within a round, and left to the script at the end; no graph can hold
//   such a round. (tests/parity/test_lazy_buckets.py)
//   (Tables of a fused pass are kernel arguments, so a CUDA graph can hold a round.)
// * What becomes `.grad` is an alias of the slot and belongs to the script, which may do with it
//   what it likes: the slot itself stays here. (tests/parity/test_grad_is_the_scripts.py)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/plan.h"
#include "reducer/bucket.h"
#include "reducer/context.h"
#include "reducer/launch.h"
#include "reducer/parameters.h"

namespace fastddp {

// While one exists, every parameter has a place in it; but the places of lazy buckets exist in
// rounds only.
class Buckets {
 public:
  // `is_fused`: whether buckets are filled by fused passes, which set flags from ones.
  Buckets(const Context& context,
          Parameters& params,
          std::shared_ptr<const Plan> plan,
          const Form& form,
          bool is_fused);
  Buckets(const Buckets&) = delete;
  Buckets& operator=(const Buckets&) = delete;

  std::size_t size() const { return all_.size(); }
  Bucket& operator[](std::size_t index) { return all_[index]; }
  const Bucket& operator[](std::size_t index) const { return all_[index]; }
  auto begin() const { return all_.begin(); }
  auto end() const { return all_.end(); }
  // The flags that travel in no bucket, and marks; if there are any.
  const std::optional<Bucket>& loose() const { return loose_; }

  const std::shared_ptr<const Plan>& plan() const { return plan_; }
  const LaunchNumbers& numbers() const { return numbers_; }
  // How many bytes the buckets' collectives reduce in a round.
  std::int64_t bytes_per_round() const;
  std::vector<Marked> marked() const;

  // Has the marks say, from the next launch on, that this rank's model has changed.
  void announce_change();
  // Allocates a lazy bucket in the midst of a round. Returns whether it was not there.
  bool install_lazily(std::size_t index);
  // Leaves lazy buckets to the script: no reference from in here keeps them alive. What stays is
  // small, and in memory of its own.
  void leave_to_script();
  // A round begins that is recorded into a graph, or is not. Leaves the buckets that the script
  // refers to, unless a graph refers to the memory: it goes on to write where it did.
  void begin_round(bool is_captured);

  // Whether a graph refers to the memory.
  bool is_captured() const { return is_captured_; }

 private:
  void leave_what_is_held();
  Bucket install(std::size_t index);
  Bucket lend(LaunchId id,
              const at::Tensor& flat,
              const at::Tensor& wire,
              std::int64_t flags_offset,
              std::int64_t num_flags,
              const at::Tensor& sent_marks) const;
  bool is_held(const Bucket& bucket) const;
  at::ScalarType dtype_of_gradients(std::size_t index) const;
  at::ScalarType dtype_of_wire(std::size_t index) const;

  const Context& context_;
  Parameters& params_;
  const std::shared_ptr<const Plan> plan_;
  const Form form_;
  const bool is_fused_;
  const LaunchNumbers numbers_;
  std::vector<Bucket> all_;  // lazy ones are there in rounds only, but for flags and marks
  std::optional<Bucket> loose_;
  bool is_captured_ = false;
};

}  // namespace fastddp
