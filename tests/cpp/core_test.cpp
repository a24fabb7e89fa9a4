#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "core/plan.h"
#include "core/schedule.h"
#include "core/tracker.h"

using fastddp::BucketPlan;
using fastddp::ParamSpec;
using fastddp::plan_buckets;
using fastddp::ReadyTracker;
using fastddp::Schedule;
using fastddp::SlotPlan;

namespace {

constexpr std::int64_t kFloat = 0;
constexpr std::int64_t kDouble = 1;

ParamSpec floats(std::int64_t numel) { return {numel, 4, kFloat}; }

std::vector<std::int64_t> iota(std::size_t size) {
  std::vector<std::int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

}  // namespace

TEST(small_parameters_share_a_bucket_at_aligned_offsets) {
  const auto plan = plan_buckets({floats(3), floats(5), floats(1)}, {2, 1, 0}, {1024});
  CHECK(plan.size() == 1);
  CHECK((plan[0].slots == std::vector<SlotPlan>{{2, 0, 1}, {1, 4, 5}, {0, 12, 3}}));
  CHECK(plan[0].flags_offset == 16);
  CHECK(plan[0].numel == 20);
}

TEST(a_bucket_is_closed_once_it_holds_its_cap) {
  const auto plan = plan_buckets({floats(4), floats(4), floats(4), floats(4)}, iota(4), {16, 32});
  CHECK(plan.size() == 3);  // 16 bytes, then 32, then what is left
  CHECK(plan[0].slots.size() == 1);
  CHECK(plan[1].slots.size() == 2);
  CHECK(plan[2].slots.size() == 1);
}

TEST(buckets_are_ordered_by_the_arrival_of_their_last_gradient) {
  // The double bucket opens first and fills last.
  const auto plan = plan_buckets({{1, 8, kDouble}, floats(8), {1, 8, kDouble}}, iota(3), {32});
  CHECK(plan.size() == 2);
  CHECK(plan[0].kind == kFloat);
  CHECK(plan[1].kind == kDouble);
}

TEST(no_parameters_make_no_buckets) { CHECK(plan_buckets({}, {}, {1}).empty()); }

TEST(an_empty_parameter_has_a_slot_and_a_flag) {
  const auto plan = plan_buckets({floats(0)}, {0}, {16});
  CHECK(plan.size() == 1);
  CHECK(plan[0].flags_offset == 0);
  CHECK(plan[0].numel == 4);
}

TEST(bad_orders_and_caps_are_refused) {
  CHECK_THROWS(plan_buckets({floats(1)}, {0}, {}), std::invalid_argument);
  CHECK_THROWS(plan_buckets({floats(1)}, {}, {16}), std::invalid_argument);
  CHECK_THROWS(plan_buckets({floats(1)}, {1}, {16}), std::invalid_argument);
  CHECK_THROWS(plan_buckets({floats(1)}, {-1}, {16}), std::invalid_argument);
  CHECK_THROWS(plan_buckets({floats(1), floats(1)}, {0, 0}, {16}), std::invalid_argument);
}

TEST(buckets_are_handed_out_in_plan_order_whatever_order_they_fill_in) {
  const auto plan = plan_buckets({floats(4), floats(4), floats(4)}, iota(3), {16});
  ReadyTracker tracker(plan);
  CHECK(tracker.pop_full() == ReadyTracker::kNone);
  tracker.mark(2);
  tracker.mark(1);
  CHECK(tracker.pop_full() == ReadyTracker::kNone);
  CHECK(!tracker.launched(0));
  tracker.mark(0);
  CHECK(tracker.pop_full() == 0);
  CHECK(tracker.launched(0));
  CHECK(tracker.pop_full() == 1);
  CHECK(tracker.pop_full() == 2);
  CHECK(tracker.pop_full() == ReadyTracker::kNone);
  CHECK(tracker.pop() == ReadyTracker::kNone);
}

TEST(what_never_fills_can_be_popped) {
  const auto plan = plan_buckets({floats(4), floats(4)}, iota(2), {16});
  ReadyTracker tracker(plan);
  tracker.mark(1);
  CHECK(tracker.pop_full() == ReadyTracker::kNone);
  CHECK(tracker.pop() == 0);
  CHECK(tracker.pop() == 1);
  CHECK(tracker.pop() == ReadyTracker::kNone);
}

TEST(random_arrivals_launch_each_bucket_once_and_in_order) {
  std::mt19937 random(7);
  for (int repetition = 0; repetition < 200; ++repetition) {
    std::vector<ParamSpec> params(1 + random() % 40);
    for (auto& param : params) {
      param = random() % 3 == 0 ? ParamSpec{static_cast<std::int64_t>(random() % 50), 8, kDouble}
                                : floats(static_cast<std::int64_t>(random() % 100));
    }
    auto order = iota(params.size());
    std::shuffle(order.begin(), order.end(), random);
    const auto plan = plan_buckets(params, order, {64, 512});
    std::vector<std::size_t> bucket_of(params.size());
    for (std::size_t bucket = 0; bucket < plan.size(); ++bucket) {
      for (const SlotPlan& slot : plan[bucket].slots)
        bucket_of[static_cast<std::size_t>(slot.param)] = bucket;
    }
    std::shuffle(order.begin(), order.end(), random);
    ReadyTracker tracker(plan);
    std::size_t expected = 0;
    for (const std::int64_t param : order) {
      tracker.mark(bucket_of[static_cast<std::size_t>(param)]);
      for (auto bucket = tracker.pop_full(); bucket != ReadyTracker::kNone;
           bucket = tracker.pop_full()) {
        CHECK(bucket == expected++);
      }
    }
    CHECK(expected == plan.size());
  }
}

TEST(schedules_try_both_in_turn_and_keep_what_all_find_faster) {
  for (const bool early_is_faster : {true, false}) {
    Schedule schedule;
    int tried[2] = {0, 0};
    for (int round = 0; round < 10; ++round) {
      const bool early = schedule.begin();
      CHECK(!schedule.is_due());
      ++tried[early ? 1 : 0];
      // The first of each is slow, as first rounds are; noise is not what decides.
      const double noise = tried[early ? 1 : 0] == 1 ? 1000.0 : 10.0;
      schedule.add(early, noise + (early == early_is_faster ? 0.0 : 1.0));
    }
    CHECK(tried[0] == 5 && tried[1] == 5);
    CHECK(!schedule.begin());
    CHECK(schedule.is_due());
    CHECK((schedule.early_us() < schedule.late_us()) == early_is_faster);
    schedule.decide(2 * schedule.early_us(), 2 * schedule.late_us());
    for (int i = 0; i < 20; ++i) {
      CHECK(schedule.begin() == early_is_faster);
      CHECK(!schedule.is_due());
      schedule.add(early_is_faster, 1e9);
    }
  }
}

int main() { return check::run(); }
