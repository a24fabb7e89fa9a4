// When full buckets are launched: as they fill, so that another thread reduces them while backward
// goes on, or all at the end of backward, by the thread that then has to wait for them anyway.
//
// Launching early hides communication where a core is free for it. Where every core computes, it
// only adds switches between threads. Which is better depends on the model and the machine, so the
// first rounds of a plan try both in turn, and in the round after them the ranks add up their best
// times.
//
// Invariant: all ranks have the same schedule in the same round. Otherwise a collective of another
// model, or of the user, would come before a bucket on one rank and after it on another. So the
// schedule depends only on the number of rounds begun and on what all ranks have agreed on. Guarded
// by tests/parity/test_shared_memory.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace fastddp {

class Schedule {
 public:
  // Begins a round; returns whether it launches its buckets as they fill.
  bool begin() {
    const std::int64_t round = begun_++;
    return round < kTrials ? round % 2 == 1 : early_;
  }

  // Records how long a round took that ended without an error.
  void add(bool was_early, double round_us) {
    double& best = was_early ? early_us_ : late_us_;
    best = std::min(best, round_us);
  }

  // Whether this is the round in which the ranks add up their early_us() and late_us().
  bool is_due() const { return begun_ == kTrials + 1; }
  double early_us() const { return early_us_; }
  double late_us() const { return late_us_; }
  void decide(double sum_early_us, double sum_late_us) { early_ = sum_early_us < sum_late_us; }

 private:
  static constexpr int kTrials = 10;

  std::int64_t begun_ = 0;
  bool early_ = false;
  double early_us_ = std::numeric_limits<double>::infinity();
  double late_us_ = std::numeric_limits<double>::infinity();
};

}  // namespace fastddp
