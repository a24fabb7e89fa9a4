// What the ranks agree on between two rounds: the order in which gradients arrive, which the plan
// follows, and whether buckets are launched while backward goes on.
//
// The end of one round launches what it takes, and the head of the next one reads it, on every
// rank, so nobody waits for it in between.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/schedule.h"
#include "reducer/context.h"

namespace fastddp {

class Agreements {
 public:
  explicit Agreements(const Context& context) : context_(context) {}

  // Of the installed plan; a new plan begins a new one, where all ranks are in the same round.
  Schedule schedule;

  // Whether the order of arrival has been sent.
  bool order_is_learned() const { return order_is_learned_; }
  // Whether the order is still to be read.
  bool is_order_under_way() const { return order_.has_value(); }
  // Starts to send rank 0's order of arrival to all.
  void start_with_order(const std::vector<std::int64_t>& order);
  // Waits for it, if it is on its way.
  std::optional<std::vector<std::int64_t>> await_order();

  // Starts to add up how long the rounds of all ranks took.
  void start_with_schedule();
  // Waits for the sums, if they are on their way, and has the schedule decide.
  void await_schedule();

 private:
  // A collective that is under way.
  struct Exchange {
    std::vector<at::Tensor> tensors;
    c10::intrusive_ptr<c10d::Work> work;
  };

  at::Tensor take(std::optional<Exchange>& exchange, const char* what) const;

  const Context& context_;
  std::optional<Exchange> order_;
  std::optional<Exchange> times_;
  bool order_is_learned_ = false;
};

}  // namespace fastddp
