// Under a thread sanitizer, the bodies below write to plain memory on purpose: it reports them if
// two of them ever run at once, or if what one wrote does not reach whoever comes next.
#include "core/turns.h"

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/outcome.h"

using fastddp::Outcome;
using fastddp::Turns;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

constexpr milliseconds kNoLimit{0};    // for Outcome::wait()
constexpr milliseconds kLong{30'000};  // longer than any test may wait for what does come
constexpr milliseconds kAMoment{20};   // for what is not to come

template <typename Condition>
void wait_until(const Condition& condition) {
  const auto end = steady_clock::now() + kLong;
  while (!condition()) {
    if (steady_clock::now() > end) throw std::runtime_error("what was waited for did not come");
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

// An outcome with a listener that counts how often it is told, and by which thread.
class Told final : public Outcome {
 public:
  // `then`: what is chained to the end, and runs in the thread that tells.
  void listen_for(std::function<void()> then) {
    listen([&] { then_ = std::move(then); });
  }
  void tell() override {
    teller_ = std::this_thread::get_id();
    if (then_) then_();
    count_.fetch_add(1);
  }
  int count() const { return count_.load(); }
  std::thread::id teller() const { return teller_; }  // once count() is not zero
  void await() const {
    wait_until([this] { return count() > 0; });
  }

 private:
  std::function<void()> then_;
  std::thread::id teller_;
  std::atomic<int> count_{0};
};

// Holds up whoever passes until it is opened.
class Gate {
 public:
  void open() { opened_.set_value(); }
  void pass() const { CHECK(future_.wait_for(kLong) == std::future_status::ready); }

 private:
  std::promise<void> opened_;
  const std::shared_future<void> future_ = opened_.get_future().share();
};

// Turns that end with the test, however it ends: to be declared after all that its jobs use.
class Queue {
 public:
  ~Queue() { turns_->stop(kLong); }
  Turns* operator->() const { return turns_.get(); }

 private:
  const std::shared_ptr<Turns> turns_ = std::make_shared<Turns>();
};

// Remembers which thread frees it.
class Freed {
 public:
  explicit Freed(std::thread::id& by) : by_(by) {}
  ~Freed() { by_ = std::this_thread::get_id(); }
  Freed(const Freed&) = delete;
  Freed& operator=(const Freed&) = delete;

 private:
  std::thread::id& by_;
};

std::string message_of(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& thrown) {
    return thrown.what();
  }
  return {};
}

}  // namespace

// ---- order -----------------------------------------------------------------------------

TEST(jobs_run_one_at_a_time_in_the_order_of_launching) {
  constexpr int kJobs = 200;
  std::vector<int> order;
  const Queue turns;
  for (int i = 0; i < kJobs; ++i) {
    if (i % 7 == 3) {
      turns->run([&, i] { order.push_back(i); });
      CHECK(static_cast<int>(order.size()) == i + 1);
    } else {
      turns->submit([&, i] { order.push_back(i); });
    }
  }
  CHECK(turns->wait_until_idle(kLong));
  CHECK(turns->idle());
  CHECK(static_cast<int>(order.size()) == kJobs);
  for (int i = 0; i < kJobs; ++i) CHECK(order[static_cast<std::size_t>(i)] == i);
}

TEST(a_job_runs_in_its_launcher_if_that_waits_for_it_and_elsewhere_if_not) {
  std::thread::id ran, submitted;
  const Queue turns;
  turns->run([&] { ran = std::this_thread::get_id(); });
  turns->submit([&] { submitted = std::this_thread::get_id(); });
  CHECK(turns->wait_until_idle(kLong));
  CHECK(ran == std::this_thread::get_id());
  CHECK(submitted != std::thread::id() && submitted != ran);
}

TEST(several_threads_launch_and_each_ones_jobs_keep_their_order) {
  constexpr int kThreads = 4;
  constexpr int kJobs = 150;
  std::vector<std::pair<int, int>> order;  // thread, its job
  const Queue turns;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kJobs; ++i) {
        const auto body = [&, thread, i] { order.emplace_back(thread, i); };
        if ((i + thread) % 3 == 0) {
          turns->run(body);
        } else {
          turns->submit(body);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(turns->wait_until_idle(kLong));
  CHECK(static_cast<int>(order.size()) == kThreads * kJobs);
  std::vector<int> next(kThreads);
  for (const auto& [thread, i] : order) CHECK(next[static_cast<std::size_t>(thread)]++ == i);
}

TEST(a_body_may_launch_what_comes_after_it) {
  int ended = 0;
  const Queue turns;
  const auto later = std::make_shared<Outcome>();
  turns->run([&] { turns->enqueue([&] { ended = 2; }, later); });
  CHECK(later->wait(kLong));
  CHECK(ended == 2);
}

TEST(nothing_is_idle_before_it_has_ended) {
  Gate gate;
  const Queue turns;
  CHECK(turns->idle());
  turns->submit([&] { gate.pass(); });
  CHECK(!turns->idle());
  CHECK(!turns->wait_until_idle(kAMoment));
  gate.open();
  CHECK(turns->wait_until_idle(kLong));
}

// ---- outcomes --------------------------------------------------------------------------

TEST(an_outcome_is_set_once_its_job_has_ended) {
  Gate gate;
  int written = 0, at_end = 0;
  const auto outcome = std::make_shared<Outcome>();
  const Queue turns;
  outcome->at_end([&] { at_end = written; });
  turns->submit(
      [&] {
        gate.pass();
        written = 7;
      },
      outcome);
  CHECK(!outcome->wait(kAMoment));
  CHECK(!outcome->is_set());
  gate.open();
  CHECK(outcome->wait(kNoLimit));
  CHECK(outcome->is_set() && !outcome->error());
  CHECK(written == 7 && at_end == 7);
}

TEST(what_a_job_throws_reaches_its_own_outcome_alone) {
  const Queue turns;
  const auto before = std::make_shared<Outcome>(), fails = std::make_shared<Outcome>(),
             after = std::make_shared<Outcome>();
  turns->submit([] {}, before);
  turns->submit([] { throw std::runtime_error("broken"); }, fails);
  turns->submit([] {}, after);
  CHECK(after->wait(kLong) && fails->wait(kLong) && before->wait(kLong));
  CHECK(message_of(fails->error()) == "broken");
  CHECK(!before->error() && !after->error());
}

TEST(what_a_job_throws_in_its_launcher_is_thrown_there_and_ends_the_turn) {
  const Queue turns;
  CHECK_THROWS(turns->run([] { throw std::runtime_error("broken"); }), std::runtime_error);
  bool came = false;
  turns->run([&] { came = true; });
  CHECK(came && turns->idle());
}

// ---- listeners -------------------------------------------------------------------------

TEST(a_listener_made_before_the_end_is_told_once_by_the_thread_of_the_job) {
  Gate gate;
  std::thread::id ran_by;
  const auto outcome = std::make_shared<Told>();
  const Queue turns;
  turns->submit(
      [&] {
        gate.pass();
        ran_by = std::this_thread::get_id();
      },
      outcome);
  bool was_set = false;
  outcome->listen_for([&] { was_set = outcome->is_set(); });
  outcome->listen_for([] { throw std::logic_error("there is a listener already"); });
  CHECK(outcome->count() == 0);
  gate.open();
  outcome->await();
  CHECK(was_set && outcome->teller() == ran_by);
  CHECK(turns->stop(kLong));
  CHECK(outcome->count() == 1);
}

TEST(a_listener_made_after_the_end_is_told_once_and_at_once) {
  const Queue turns;
  const auto outcome = std::make_shared<Told>();
  turns->submit([] { throw std::runtime_error("broken"); }, outcome);
  CHECK(outcome->wait(kLong));
  std::string heard;
  outcome->listen_for([&] { heard = message_of(outcome->error()); });
  CHECK(heard == "broken");
  CHECK(outcome->teller() == std::this_thread::get_id());
  outcome->listen_for([&] { heard = "again"; });
  CHECK(turns->stop(kLong));
  CHECK(outcome->count() == 1 && heard == "broken");
}

TEST(listeners_made_while_the_job_ends_are_told_exactly_once) {
  constexpr int kRounds = 300;
  constexpr int kThreads = 3;
  const Queue turns;
  for (int round = 0; round < kRounds; ++round) {
    const auto outcome = std::make_shared<Told>();
    int written = 0, heard = 0;
    std::atomic<bool> begin{false};
    turns->submit(
        [&] {
          while (!begin.load()) std::this_thread::yield();
          written = 1;
        },
        outcome);
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&] {
        while (!begin.load()) std::this_thread::yield();
        outcome->listen_for([&] { heard = written; });
      });
    }
    begin.store(true);
    for (std::thread& thread : threads) thread.join();
    outcome->await();
    CHECK(heard == 1 && outcome->count() == 1);
  }
}

TEST(a_listener_may_wait_for_another_job) {
  Gate gate;
  int told = 0;
  const auto first = std::make_shared<Told>(), second = std::make_shared<Told>();
  const Queue turns;
  turns->submit([&] { gate.pass(); }, first);
  first->listen_for([&] {
    // Its own thread is busy with this, so another one has to run these.
    turns->submit([&] { told += 1; }, second);
    CHECK(second->wait(kLong));
    const auto third = std::make_shared<Outcome>();
    turns->submit([&] { told += 10; }, third);
    CHECK(third->wait(kLong));
    turns->run([&] { told += 100; });
  });
  gate.open();
  first->await();
  CHECK(told == 111);
}

TEST(a_job_that_waits_behind_a_busy_listener_gets_a_thread) {
  Gate job, listener;
  const Queue turns;
  const auto first = std::make_shared<Told>();
  const auto second = std::make_shared<Outcome>();
  first->listen_for([&] { listener.pass(); });
  turns->submit([&] { job.pass(); }, first);
  turns->submit([] {}, second);  // before anybody knows that the listener takes long
  job.open();
  CHECK(second->wait(kLong));
  CHECK(first->count() == 0);
  listener.open();
  first->await();
}

// ---- stop ------------------------------------------------------------------------------

TEST(stop_waits_for_the_jobs_that_wait) {
  constexpr int kJobs = 50;
  const auto turns = std::make_shared<Turns>();
  Gate gate;
  int ended = 0;
  turns->submit([&] { gate.pass(); });
  for (int i = 0; i < kJobs; ++i) turns->submit([&] { ++ended; });
  std::thread opener([&] {
    std::this_thread::sleep_for(kAMoment);
    gate.open();
  });
  CHECK(turns->stop(kLong));
  CHECK(ended == kJobs && turns->idle());
  opener.join();
}

TEST(stop_ends_the_threads_of_several_launchers) {
  constexpr int kThreads = 3;
  constexpr int kJobs = 40;
  const auto turns = std::make_shared<Turns>();
  int ended = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < kJobs; ++i) turns->submit([&] { ++ended; });
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(turns->stop(kLong));
  CHECK(ended == kThreads * kJobs);
  CHECK(turns.use_count() == 1);  // each thread holds it until it ends
}

TEST(stop_without_a_thread_has_nothing_to_wait_for) {
  const auto turns = std::make_shared<Turns>();
  CHECK(turns->stop(kAMoment));
  turns->run([] {});
  CHECK(turns->stop(kAMoment));
}

TEST(stop_leaves_a_listener_that_takes_too_long_to_itself) {
  auto turns = std::make_shared<Turns>();
  const std::weak_ptr<Turns> watched = turns;
  Gate gate;
  const auto outcome = std::make_shared<Told>();
  outcome->listen_for([&] { gate.pass(); });
  turns->submit([] {}, outcome);
  CHECK(!turns->stop(kAMoment));
  turns.reset();
  CHECK(!watched.expired());  // its thread has it
  gate.open();
  wait_until([&] { return watched.expired(); });
  CHECK(outcome->count() == 1);
}

// ---- who frees what --------------------------------------------------------------------

TEST(what_a_job_holds_is_freed_by_whoever_launches_next) {
  std::thread::id by_submit, by_run, by_sweep;
  const Queue turns;
  auto held = std::make_shared<Freed>(by_submit);
  turns->submit([held] {});
  held.reset();
  CHECK(turns->wait_until_idle(kLong));
  CHECK(by_submit == std::thread::id());

  held = std::make_shared<Freed>(by_run);
  turns->submit([held] {});
  held.reset();
  CHECK(by_submit == std::this_thread::get_id());
  CHECK(turns->wait_until_idle(kLong));

  held = std::make_shared<Freed>(by_sweep);
  turns->run([] {});
  CHECK(by_run == std::this_thread::get_id());
  turns->submit([held] {});
  held.reset();
  CHECK(turns->wait_until_idle(kLong));
  turns->sweep();
  CHECK(by_sweep == std::this_thread::get_id());
}

TEST(the_worker_frees_nothing_even_if_its_listener_launches) {
  std::thread::id by_job, by_error, by_listener;
  const Queue turns;
  auto job = std::make_shared<Freed>(by_job);
  auto error = std::make_shared<Freed>(by_error);
  auto chained = std::make_shared<Freed>(by_listener);
  auto outcome = std::make_shared<Told>();
  outcome->listen_for([&turns, chained] { turns->submit([] {}); });
  turns->submit([job, error] { throw error; }, outcome);
  job.reset();
  error.reset();
  chained.reset();
  outcome.reset();  // nobody but the queue has these any more
  CHECK(turns->stop(kLong));
  CHECK(by_job == std::thread::id() && by_error == by_job && by_listener == by_job);
  turns->sweep();
  CHECK(by_job == std::this_thread::get_id() && by_error == by_job && by_listener == by_job);
}

TEST(the_worker_does_not_free_an_outcome_that_only_it_has) {
  std::thread::id by_job, by_listener;
  Gate gate;
  const Queue turns;
  auto job = std::make_shared<Freed>(by_job);
  auto chained = std::make_shared<Freed>(by_listener);
  auto outcome = std::make_shared<Told>();
  outcome->listen_for([&gate, chained] { gate.pass(); });
  turns->submit([job] {}, outcome);
  job.reset();
  chained.reset();
  outcome.reset();
  CHECK(turns->wait_until_idle(kLong));
  turns->sweep();  // while the worker tells the listener, or is about to
  CHECK(by_job == std::this_thread::get_id());
  gate.open();
  CHECK(turns->stop(kLong));
  CHECK(by_listener == std::thread::id());
  turns->sweep();
  CHECK(by_listener == std::this_thread::get_id());
}

TEST(what_a_sweep_frees_may_take_a_turn) {
  int ended = 0;
  const Queue turns;
  struct Launches {
    const Queue& queue;
    int& ended;
    ~Launches() {
      queue->run([this] { ++ended; });
    }
  };
  auto held = std::shared_ptr<Launches>(new Launches{turns, ended});
  turns->submit([held] {});
  held.reset();
  CHECK(turns->wait_until_idle(kLong));
  turns->run([&] { ended += 10; });
  CHECK(ended == 11);
}

TEST(a_listener_may_drop_the_last_reference_and_stop_the_thread_that_it_runs_in) {
  // As when what a user has chained to a future drops the last reference to a process group.
  struct Owner {
    std::atomic<int>& stopped;
    std::shared_ptr<Turns> turns = std::make_shared<Turns>();
    ~Owner() {
      if (turns->stop(kLong)) stopped.fetch_add(1);
      turns->sweep();
    }
  };
  std::atomic<int> stopped{0};
  auto owner = std::shared_ptr<Owner>(new Owner{stopped});
  const std::weak_ptr<Turns> watched = owner->turns;
  Gate gate;
  const auto outcome = std::make_shared<Told>();
  owner->turns->submit([&] { gate.pass(); }, outcome);
  outcome->listen_for([owner = std::move(owner)]() mutable { owner.reset(); });
  gate.open();
  outcome->await();
  CHECK(stopped.load() == 1);
  CHECK(outcome->teller() != std::this_thread::get_id());
  // Its thread was detached, has the last reference now, and ends.
  wait_until([&] { return watched.expired(); });
}

int main() { return check::run(); }
