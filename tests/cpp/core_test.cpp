#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/launch_order.h"
#include "core/marks.h"
#include "core/phase.h"
#include "core/plan.h"
#include "core/schedule.h"
#include "core/tracker.h"

using fastddp::any_changed;
using fastddp::BucketPlan;
using fastddp::CurrentPhase;
using fastddp::is_mixed;
using fastddp::label_of;
using fastddp::LaunchOrder;
using fastddp::Marks;
using fastddp::marks_of;
using fastddp::ParamSpec;
using fastddp::Phase;
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

// Returns the next bucket if it is full.
std::size_t pop_full(ReadyTracker& tracker) {
  return tracker.is_next_full() ? tracker.pop() : ReadyTracker::kNone;
}

const int& key_of(std::uint32_t thread) {
  static const std::array<int, 4> keys{};
  return keys[thread];
}

}  // namespace

TEST(small_parameters_share_a_bucket_at_aligned_offsets) {
  const auto plan = plan_buckets({floats(3), floats(5), floats(1)}, {2, 1, 0}, {1024});
  CHECK(plan.size() == 1);
  CHECK((plan[0].slots == std::vector<SlotPlan>{{2, 0, 1}, {1, 4, 5}, {0, 12, 3}}));
  CHECK(plan[0].flags_offset == 16);
  CHECK(plan[0].numel == 52);  // with three flags and 33 marks, a multiple of 16 bytes
}

TEST(a_bucket_is_closed_once_it_holds_its_cap) {
  const auto plan = plan_buckets({floats(4), floats(4), floats(4), floats(4)}, iota(4), {16, 32});
  CHECK(plan.size() == 3);  // 16 bytes, then 32, then the rest
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
  CHECK(plan[0].numel == 36);
}

TEST(marks_say_whose_a_bucket_is_and_what_has_changed) {
  const auto mine = label_of(7, 1), other = label_of(8, 1);
  CHECK(mine != other);
  Marks sum = marks_of(mine, false);
  CHECK(!is_mixed(mine, sum.data()));
  CHECK(!any_changed(sum.data()));
  const Marks theirs = marks_of(other, true);
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += theirs[i];
  CHECK(is_mixed(mine, sum.data()));
  CHECK(is_mixed(other, sum.data()));
  CHECK(any_changed(sum.data()));
}

TEST(rounds_launch_in_the_order_in_which_they_began) {
  LaunchOrder order;
  const int first = 0, second = 0, third = 0;
  for (const int* reducer : {&first, &second, &third}) order.begin(reducer);
  CHECK(order.may_launch(&first));
  CHECK(!order.may_launch(&second));
  order.end(&second);  // abandoned
  CHECK(!order.may_launch(&third));
  order.end(&first);
  order.end(&first);
  CHECK(order.may_launch(&third));
}

TEST(an_order_may_be_asked_from_several_threads) {
  LaunchOrder order;
  std::atomic<int> done{0};
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < 4; ++i) {
    threads.emplace_back([&order, &done, i] {
      order.introduce(i, "model");
      for (int round = 0; round < 200; ++round) {
        order.begin(&key_of(i));
        while (!order.may_launch(&key_of(i))) std::this_thread::yield();
        order.end(&key_of(i));
      }
      ++done;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(done == 4);
  CHECK(order.others(0) == "model, model, model");
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
  CHECK(pop_full(tracker) == ReadyTracker::kNone);
  tracker.mark(2);
  tracker.mark(1);
  CHECK(pop_full(tracker) == ReadyTracker::kNone);
  CHECK(!tracker.launched(0));
  tracker.mark(0);
  CHECK(pop_full(tracker) == 0);
  CHECK(tracker.launched(0));
  CHECK(pop_full(tracker) == 1);
  CHECK(pop_full(tracker) == 2);
  CHECK(pop_full(tracker) == ReadyTracker::kNone);
  CHECK(tracker.pop() == ReadyTracker::kNone);
}

TEST(what_never_fills_can_be_popped) {
  const auto plan = plan_buckets({floats(4), floats(4)}, iota(2), {16});
  ReadyTracker tracker(plan);
  tracker.mark(1);
  CHECK(pop_full(tracker) == ReadyTracker::kNone);
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
      for (auto bucket = pop_full(tracker); bucket != ReadyTracker::kNone;
           bucket = pop_full(tracker)) {
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
      // The first round of each kind is slow, as first rounds are; noise must not decide.
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

TEST(a_round_moves_through_its_phases) {
  using enum Phase;
  for (const auto& life : std::vector<std::vector<Phase>>{{kFilling, kBetween},
                                                          {kFilling, kInFlight, kBetween},
                                                          {kFilling, kFinalized, kBetween}}) {
    CurrentPhase phase;
    CHECK(phase.is(kBetween));
    for (const Phase next : life) {
      phase.move_to(next);
      CHECK(phase.get() == next);
    }
  }
}

TEST(an_illegal_move_names_both_phases_and_moves_nothing) {
  using enum Phase;
  const std::array<std::pair<Phase, std::vector<Phase>>, 4> illegal{
      {{kBetween, {kBetween, kInFlight, kFinalized}},
       {kFilling, {kFilling}},
       {kInFlight, {kFilling, kInFlight, kFinalized}},
       {kFinalized, {kFilling, kInFlight, kFinalized}}}};
  for (const auto& [from, moves] : illegal) {
    for (const Phase to : moves) {
      CurrentPhase phase;
      if (from != kBetween) phase.move_to(kFilling);
      if (from == kInFlight || from == kFinalized) phase.move_to(from);
      std::string text;
      try {
        phase.move_to(to);
      } catch (const std::logic_error& error) {
        text = error.what();
      }
      CHECK(text == std::string("fastddp: a reducer cannot go from phase ") + describe(from) +
                        " to phase " + describe(to));
      CHECK(phase.is(from));
    }
  }
}

int main() { return check::run(); }
