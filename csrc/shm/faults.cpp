// How a group fails: what a rank looks for while a wait lasts, and the verdict that all ranks throw
// once one of them has found a fault.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <thread>

#include "core/slow_wait.h"
#include "shm/error.h"
#include "shm/group.h"
#include "shm/heap.h"

namespace fastddp::shm {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::steady_clock;

// The board has a word for the ranks of a group, with a bit for each.
constexpr std::size_t kRanksOnBoard = 64;

}  // namespace

void Group::wait_slowly(std::size_t index, Time time) {
  Clock& clock = layout_.rank(index).clock;
  const auto begin = steady_clock::now();
  std::optional<SlowWait> slow;
  while (!clock.reached(time)) {
    const nanoseconds left = deadline_ - steady_clock::now();
    clock.sleep(time, std::clamp<nanoseconds>(left, nanoseconds(0), kLookAround));
    if (clock.reached(time)) return;
    find_fault(index, time);
    // A clock wakes its sleepers whenever it advances: what comes soon stays off the board.
    if (!slow && steady_clock::now() - begin < kLookAround) continue;
    if (!slow) slow.emplace(what(), describe_current(), steady_clock::now() - begin);
    look_around(*slow, time);
  }
}

void Group::look_around(SlowWait& wait, Time time) {
  std::uint64_t missing = 0;
  std::uint64_t unfinished = 0;
  for (std::size_t i = 0; i < size(); ++i) {
    const Clock& clock = layout_.rank(i).clock;
    if (i == me_ || rank(i) >= static_cast<int>(kRanksOnBoard) || clock.reached(time)) continue;
    (clock.reached(first_) ? unfinished : missing) |= std::uint64_t{1} << rank(i);
  }
  try {
    wait.look(missing, unfinished);
  } catch (const WaitFailed& error) {
    fail(error.what());
  }
}

void Group::find_fault(std::size_t index, Time time) {
  check_current();
  for (std::size_t i = 0; i < size(); ++i) {
    if (i == me_) continue;
    const RankBlock& block = layout_.rank(i);
    const Process& process = *members_[i].process;
    const bool left = block.state.load(std::memory_order_acquire) == State::kLeft;
    if (!left && !process.ended()) continue;
    if (block.clock.reached(time)) continue;  // it ended after it had done its part
    // A rank that leaves is often about to end, and a message that says how it ended tells more.
    for (int i_look = 0; i_look < 20 && !process.ended(); ++i_look)
      std::this_thread::sleep_for(milliseconds(10));
    const std::string who = "rank " + std::to_string(members_[i].rank);
    const char* when = block.clock.reached(first_) ? " in the midst of it" : " before it took part";
    if (process.ended()) fail(who + " " + process.describe() + when);
    fail(who + " has left the group" + when + "; it called destroy_process_group or is ending");
  }
  if (steady_clock::now() < deadline_) return;
  std::string missing;
  for (std::size_t i = 0; i < size(); ++i) {
    const RankBlock& block = layout_.rank(i);
    if (i == me_ || block.clock.reached(time)) continue;
    missing += (missing.empty() ? "rank " : ", rank ") + std::to_string(members_[i].rank) + " " +
               members_[i].process->describe();
    missing +=
        block.clock.reached(first_) ? " and has not finished its part" : " and has not called it";
  }
  if (layout_.rank(index).clock.reached(time)) return;
  fail("timed out: " + missing);
}

void Group::check() const {
  if (is_broken()) throw_verdict("the group");
}

void Group::check_ended() {
  check();
  std::string killed;
  std::string others;
  for (std::size_t i = 0; i < size(); ++i) {
    const Process& process = *members_[i].process;
    if (i == me_ || !process.ended()) continue;
    std::string& list = process.was_killed() ? killed : others;
    list += (list.empty() ? "rank " : ", rank ") + std::to_string(members_[i].rank) + " " +
            process.describe();
  }
  if (killed.empty() && others.empty()) return;
  // The killed ranks come first: they are often the reason why others have ended.
  abort(killed + (killed.empty() || others.empty() ? "" : ", ") + others);
  check();
}

// Keeps the operand's memory from being used again: a peer that is stopped in the middle of the
// collective may still write to it.
void Group::retire_operand() const {
  const std::uint64_t operand = operand_.load(std::memory_order_relaxed);
  if (operand != Call::kElsewhere) Heap::mine().retire(operand);
}

void Group::abort(const std::string& why) {
  retire_operand();
  write_verdict(why);
}

void Group::leave() {
  layout_.rank(me_).state.store(State::kLeft, std::memory_order_release);
  layout_.rank(me_).clock.wake();
}

void Group::fail(const std::string& why) {
  write_verdict(why);
  throw_verdict(describe_current());
}

void Group::write_verdict(const std::string& why) {
  Verdict& verdict = layout_.header().verdict;
  auto expected = Verdict::Is::kNone;
  if (verdict.is.compare_exchange_strong(expected, Verdict::Is::kBeingWritten)) {
    std::snprintf(verdict.text.data(), verdict.text.size(), "%s", why.c_str());
    verdict.is.store(Verdict::Is::kWritten, std::memory_order_release);
  }
  for (std::size_t i = 0; i < size(); ++i) layout_.rank(i).clock.wake();
}

void Group::throw_verdict(const std::string& what) const {
  const Verdict& verdict = layout_.header().verdict;
  // The rank that writes the verdict may have died before it was done.
  for (int i = 0; i < 100 && verdict.is.load(std::memory_order_acquire) != Verdict::Is::kWritten;
       ++i) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  const bool written = verdict.is.load(std::memory_order_acquire) == Verdict::Is::kWritten;
  const std::string text(verdict.text.data(), ::strnlen(verdict.text.data(), verdict.text.size()));
  retire_operand();
  throw Error("fastddp: rank " + std::to_string(rank(me_)) + ": " + what +
              " failed: " + (written ? text : "another rank broke the group"));
}

}  // namespace fastddp::shm
