// One rank's view of a group of ranks on one host: the steps that they take together, and how they
// fail.
//
// Every collective takes a number of steps, the same number on all ranks. A rank ends a step by
// advancing its clock, and waits for the others' clocks before it relies on what they did. A rank
// announces each collective before its first step ends, and compares it with what the others have
// announced when it first waits for them. No rank waits without a deadline, for a process that has
// ended, or in a broken group: the first rank to find a fault writes the verdict, which all ranks
// throw from then on.
//
// group.cpp has the steps and the comparison, faults.cpp the failures, names.cpp the names of
// collectives in messages.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "core/events.h"
#include "core/slow_wait.h"
#include "shm/layout.h"
#include "shm/process.h"

namespace fastddp::shm {

using Deadline = std::chrono::steady_clock::time_point;

struct Member {
  int rank = 0;  // the index in the group that users know
  char* heap = nullptr;
  std::uint64_t heap_bytes = 0;
  std::shared_ptr<const Process> process;
};

class Group {
 public:
  // `members` are the ranks of this host in the order of their blocks, and `me` is the index of
  // this rank among them. The memory of `layout` and of the heaps has to outlive the group. `id` is
  // what the group is called on the board, see board::id_of().
  Group(Layout layout, std::vector<Member> members, std::size_t me, std::uint64_t id = 0);

  std::size_t size() const { return members_.size(); }
  std::size_t me() const { return me_; }
  int rank(std::size_t index) const { return members_[index].rank; }
  // Returns the index on this host of a rank of the group, or size() if it is on another host.
  std::size_t index_of(int rank) const;

  // ---- one collective at a time --------------------------------------------------------

  // Begins a collective, with this thread's label. Throws Error if the group is broken.
  void begin(const Call& call, Deadline deadline);

  // Ends a step. Returns this rank's clock, which is the end of that step.
  Time advance();

  // Waits until all other ranks have ended the step that ended at `time`. The first wait of a
  // collective also compares what the ranks announced. Throws Error.
  void await_all(Time time);
  void await(std::size_t index, Time time);

  // Compares this rank's collective with those already announced. Waits for nobody. Throws Error.
  void compare_so_far();

  // Returns what another rank announced. Valid after the first await_all().
  const Call& call_of(std::size_t index) const { return calls_[index]; }
  template <typename T = char>
  T* operand_of(std::size_t index) const {
    return reinterpret_cast<T*>(members_[index].heap + calls_[index].operand);
  }
  // Whether all operands lie in heaps.
  bool all_direct() const;

  // Throws the verdict, if there is one, as the reason why the current collective failed.
  void check_current() const {
    if (is_broken()) throw_verdict(describe_current());
  }

  // Returns the next slot, once nobody reads it any more; it is the same slot on every rank. Others
  // may read it until the end of step kLag + 1 after the current one.
  std::size_t claim_slot();
  char* slot(std::size_t index, std::size_t which) const { return layout_.slot(index, which); }

  // ---- at any time, from any thread ----------------------------------------------------

  // Breaks the group: every wait in it throws, on all ranks.
  void abort(const std::string& why);

  // Says that this rank takes part in no further collective. The others may finish those that it
  // has taken part in.
  void leave();

  // Throws the verdict if there is one.
  void check() const;
  bool is_broken() const {
    return layout_.header().verdict.is.load(std::memory_order_acquire) != Verdict::Is::kNone;
  }

  // For failures outside of this group: if a rank has ended, writes that as the verdict; then
  // throws the verdict, if there is one.
  void check_ended();

  // Returns the number of collectives begun.
  std::uint64_t count() const { return count_.load(std::memory_order_relaxed); }

  [[noreturn]] void fail(const std::string& why);

  // Records the end of the current collective, or that it has failed; see Ending.
  void record_end(bool has_failed);

  // What this group is called on the board.
  std::uint64_t id() const { return id_; }
  // For a wait in the current collective, in the thread that carries it out.
  SlowWait::What what() const { return {board::Source::kShm, id_, count(), calls_[me_].label}; }
  std::string describe_current() const;

  std::string describe(const Call& call) const;

  // Returns text such as "rank 0 called ..., rank 1 called ...", with advice, for two calls that do
  // not agree.
  std::string describe_difference(const std::string& one,
                                  const Call& its_call,
                                  const std::string& other,
                                  const Call& others_call) const;

 private:
  // `what` names what failed: the current collective, or the group.
  [[noreturn]] void throw_verdict(const std::string& what) const;
  void write_verdict(const std::string& why);
  void wait_slowly(std::size_t index, Time time);
  void look_around(SlowWait& wait, Time time);
  void find_fault(std::size_t index, Time time);
  void record(std::uint64_t time, events::Kind kind, std::uint64_t b) const;
  void record_meeting();
  void compare_with(std::size_t index);
  void compare(std::size_t index);
  void check_operand(std::size_t index);
  void retire_operand() const;

  const Layout layout_;
  const std::vector<Member> members_;
  const std::size_t me_;
  const std::uint64_t id_;
  const bool shares_cores_;  // there are more ranks than cores

  Time now_ = 0;    // this rank's clock
  Time first_ = 0;  // the end of the current collective's first step
  bool compared_ = true;
  std::vector<Call> calls_;
  Deadline deadline_;
  std::uint64_t met_ = 0;  // what is to be recorded of the meeting when the collective ends
  std::size_t next_slot_ = 0;
  std::array<Time, kSlots> free_at_{};
  std::atomic<std::uint64_t> count_{0};
  std::atomic<std::uint64_t> operand_{Call::kElsewhere};  // this rank's, in the last collective
};

// Records the end of the group's current collective when it goes out of scope: made where that
// begins.
class Ending {
 public:
  explicit Ending(Group& group) : group_(group) {}
  ~Ending() { group_.record_end(std::uncaught_exceptions() > exceptions_); }
  Ending(const Ending&) = delete;
  Ending& operator=(const Ending&) = delete;

 private:
  Group& group_;
  const int exceptions_ = std::uncaught_exceptions();
};

}  // namespace fastddp::shm
