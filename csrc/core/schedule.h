// When full buckets are launched: as they fill, to be reduced by another thread while backward goes
// on, or all at its end, by the thread that then waits for them anyway.
//
// The former hides communication where a core is free for it. Where every core computes it only
// adds switches between threads. Which is better depends on the model and the machine, so the first
// rounds of a plan try both in turn, and the best of each decides.
//
// Each rank decides for itself: when a rank launches does not change what is reduced with what.
#pragma once

#include <algorithm>
#include <limits>

namespace fastddp {

class Schedule {
 public:
  // Whether the next round launches its buckets as they fill.
  bool is_early() const { return rounds_ < kTrials ? rounds_ % 2 == 1 : early_us_ < late_us_; }
  bool is_decided() const { return rounds_ >= kTrials; }

  // Takes note of how long such a round took.
  void add(double round_us) {
    if (is_decided()) return;
    double& best = is_early() ? early_us_ : late_us_;
    best = std::min(best, round_us);
    ++rounds_;
  }

 private:
  static constexpr int kTrials = 10;

  int rounds_ = 0;
  double early_us_ = std::numeric_limits<double>::infinity();
  double late_us_ = std::numeric_limits<double>::infinity();
};

}  // namespace fastddp
