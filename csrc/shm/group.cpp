#include "shm/group.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "shm/label.h"

namespace fastddp::shm {
namespace {

using std::chrono::microseconds;
using std::chrono::nanoseconds;

// How long to spin before sleeping: about as long as a wake-up takes, so a wait never costs more
// than twice what the better choice would have cost (the ski rental problem; A. Karlin et al.,
// "Empirical Studies of Competitive Spinning", SOSP 1991). Much shorter where ranks share cores,
// because the rank that is waited for may need this core.
constexpr nanoseconds kSpin = microseconds(30);

// Once all ranks have come to a collective, waits take microseconds. A rank that slept there would
// start a chain: it wakes up late, and the ranks that wait for it fall asleep in turn.
constexpr nanoseconds kSpinInTheMidst = microseconds(300);
constexpr nanoseconds kSpinOnSharedCores = microseconds(1);

// Up to this size, the end of a collective follows so soon after the meeting of the ranks that both
// are recorded with the same time.
constexpr std::uint64_t kShortBytes = std::uint64_t{8} << 10;

std::size_t usable_cores() {
  cpu_set_t cores;
  if (::sched_getaffinity(0, sizeof(cores), &cores) != 0) return 1;
  return static_cast<std::size_t>(CPU_COUNT(&cores));
}

}  // namespace

Group::Group(Layout layout, std::vector<Member> members, std::size_t me, std::uint64_t id)
    : layout_(layout),
      members_(std::move(members)),
      me_(me),
      id_(id),
      shares_cores_(members_.size() > usable_cores()),
      calls_(members_.size()) {}

std::size_t Group::index_of(int rank) const {
  const auto member = std::find_if(members_.begin(), members_.end(),
                                   [&](const Member& each) { return each.rank == rank; });
  return static_cast<std::size_t>(member - members_.begin());
}

// ---- one collective at a time ----------------------------------------------------------

void Group::begin(const Call& call, Deadline deadline) {
  count_.fetch_add(1, std::memory_order_relaxed);
  calls_[me_] = call;
  calls_[me_].label = Label::current();
  calls_[me_].began = events::now();
  operand_.store(call.operand, std::memory_order_relaxed);
  deadline_ = deadline;
  first_ = now_ + 1;
  compared_ = false;
  met_ = 0;
  check_current();
  layout_.rank(me_).calls[count() % kCallsKept].write(first_, calls_[me_]);
  record(calls_[me_].began, events::Kind::kCollectiveBegin,
         call.numel * size_of(call.element) | static_cast<std::uint64_t>(call.kind) << 56);
}

Time Group::advance() {
  layout_.rank(me_).clock.advance_to(++now_);
  return now_;
}

void Group::await(std::size_t index, Time time) {
  const Clock& clock = layout_.rank(index).clock;
  if (clock.reached(time)) return;
  const auto spin = shares_cores_ ? kSpinOnSharedCores : compared_ ? kSpinInTheMidst : kSpin;
  if (!clock.spin(time, spin)) wait_slowly(index, time);
}

void Group::await_all(Time time) {
  for (std::size_t i = 0; i < size(); ++i) {
    if (i == me_) continue;
    await(i, time);
    if (!compared_) compare_with(i);
  }
  if (compared_) return;
  compared_ = true;
  layout_.rank(me_).agreed.store(first_, std::memory_order_release);
  record_meeting();
}

void Group::compare_so_far() {
  for (std::size_t i = 0; i < size(); ++i) {
    const RankBlock& block = layout_.rank(i);
    Call call;
    // Read once: at a second look, a rank that is many calls ahead may have replaced the call.
    if (i != me_ && block.clock.reached(first_) &&
        block.calls[count() % kCallsKept].read(first_, call)) {
      calls_[i] = call;
      compare(i);
    }
  }
}

bool Group::all_direct() const {
  return std::all_of(calls_.begin(), calls_.end(),
                     [](const Call& call) { return call.operand != Call::kElsewhere; });
}

std::size_t Group::claim_slot() {
  const std::size_t slot = next_slot_;
  for (std::size_t i = 0; i < size(); ++i) {
    if (i != me_) await(i, free_at_[slot]);
  }
  free_at_[slot] = now_ + kLag + 2;
  next_slot_ = (slot + 1) % kSlots;
  return slot;
}

// ---- what is recorded ------------------------------------------------------------------

void Group::record(std::uint64_t time, events::Kind kind, std::uint64_t b) const {
  const std::uint64_t number = count() & 0xFFFFFFFF;
  events::record_at(time, kind, Label::owner_of(calls_[me_].label), number | id_ << 32, b);
}

// Who was the last to come, and how long after the first. A rank that is many calls ahead does not
// count: it was not the last.
void Group::record_meeting() {
  constexpr std::uint64_t kMostNs = (std::uint64_t{1} << 40) - 1;
  std::size_t last = me_;
  std::uint64_t first = calls_[me_].began;
  for (std::size_t i = 0; i < size(); ++i) {
    const std::uint64_t began = calls_[i].began;
    if (began == 0) continue;
    first = std::min(first, began);
    if (began > calls_[last].began) last = i;
  }
  const std::uint64_t began = calls_[last].began;
  const std::uint64_t after = std::min(began - first, kMostNs);
  const std::uint64_t what = static_cast<std::uint64_t>(rank(last)) << 40 | after;
  const Call& call = calls_[me_];
  // A reading of the clock takes as long as all else here. Where this rank is the last, all had
  // come when it began.
  if (last == me_) {
    record(began, events::Kind::kCollectiveMet, what);
  } else if (call.numel * size_of(call.element) <= kShortBytes && !call.elsewhere && !call.across) {
    met_ = what;
  } else {
    record(events::now(), events::Kind::kCollectiveMet, what);
  }
}

void Group::record_end(bool has_failed) {
  const std::uint64_t time = events::now();
  if (met_ != 0) record(time, events::Kind::kCollectiveMet, std::exchange(met_, 0));
  record(time, has_failed ? events::Kind::kError : events::Kind::kCollectiveEnd, 0);
}

// ---- comparing what the ranks have announced --------------------------------------------

void Group::compare_with(std::size_t index) {
  const RankBlock& block = layout_.rank(index);
  if (!block.calls[count() % kCallsKept].read(first_, calls_[index])) {
    // That rank is many calls ahead, in calls that wait for nobody. If it waited in this call, it
    // has compared, so it called the same; it cannot have compared in a later call, which this rank
    // has not begun. The place of its operand is not needed then, because the rank could not go on
    // before its operand was read.
    if (block.agreed.load(std::memory_order_relaxed) == first_) {
      calls_[index] = calls_[me_];
      calls_[index].operand = Call::kElsewhere;
      calls_[index].began = 0;
    } else {
      calls_[index] = {.kind = Kind::kUnknown};
    }
  }
  compare(index);
}

void Group::compare(std::size_t index) {
  if (calls_[me_].agrees_with(calls_[index])) return check_operand(index);
  const auto [low, high] = std::minmax(me_, index);
  fail("the ranks do not agree: " +
       describe_difference("rank " + std::to_string(rank(low)), calls_[low],
                           "rank " + std::to_string(rank(high)), calls_[high]));
}

// Checks where other ranks will read and write: a stray write of one rank into the shared memory
// must not lead to stray writes of all ranks.
void Group::check_operand(std::size_t index) {
  const Call& call = calls_[index];
  const bool across = calls_[me_].across;
  const bool nowhere = call.operand == Call::kElsewhere;
  if (nowhere && !across) return;  // it goes through slots
  const std::uint64_t room = members_[index].heap_bytes;
  const std::uint64_t bytes = call.operand_bytes(size());
  if ((!call.staged || across) && call.operand <= room && bytes <= room - call.operand &&
      call.operand % size_of(call.element) == 0) {
    return;
  }
  fail("rank " + std::to_string(rank(index)) + " announced " + std::to_string(bytes) + " bytes " +
       (call.staged ? "for pieces " : "") +
       (nowhere ? "outside" : "at offset " + std::to_string(call.operand)) + " of its heap of " +
       std::to_string(room) +
       " bytes: its shared memory was written over, by a bug or by another program; nothing was "
       "read or written there");
}

}  // namespace fastddp::shm
