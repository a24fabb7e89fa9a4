#include "shm/group.h"

#include <sched.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>

#include "shm/error.h"
#include "shm/heap.h"
#include "shm/label.h"

namespace fastddp::shm {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::steady_clock;

// How long to spin before sleeping: about what a wake-up costs, so waiting never takes more than
// twice as long as the better choice would have. Next to nothing where ranks share cores: whoever
// is waited for may need this one.
constexpr nanoseconds kSpin = std::chrono::microseconds(30);

// Once all have come to a collective, what is waited for takes microseconds. To sleep there would
// be the start of a chain: whoever is woken comes late, and the next one sleeps over that.
constexpr nanoseconds kSpinInTheMidst = std::chrono::microseconds(300);
constexpr nanoseconds kSpinOnSharedCores = std::chrono::microseconds(1);

// A sleeping rank looks this often whether what it waits for can still come.
constexpr nanoseconds kLookAround = milliseconds(50);

std::size_t usable_cores() {
  cpu_set_t cores;
  if (::sched_getaffinity(0, sizeof(cores), &cores) != 0) return 1;
  return static_cast<std::size_t>(CPU_COUNT(&cores));
}

const char* name_of(Element element) {
  switch (element) {
    case Element::kFloat32:
      return "float32";
    case Element::kFloat64:
      return "float64";
    case Element::kFloat16:
      return "float16";
    case Element::kBFloat16:
      return "bfloat16";
    case Element::kInt8:
      return "int8";
    case Element::kUInt8:
      return "uint8";
    case Element::kInt16:
      return "int16";
    case Element::kInt32:
      return "int32";
    case Element::kInt64:
      return "int64";
    case Element::kBool:
      return "bool";
  }
  return "elements of an unknown type";
}

std::string printable(const TypeName& type) {
  std::string text(type.data(), ::strnlen(type.data(), type.size()));
  for (char& c : text) {
    if (std::isprint(static_cast<unsigned char>(c)) == 0) c = '?';
  }
  return text;
}

const char* name_of(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return "sum";
    case Reduction::kAvg:
      return "average";
    case Reduction::kProduct:
      return "product";
    case Reduction::kMin:
      return "minimum";
    case Reduction::kMax:
      return "maximum";
    case Reduction::kBand:
      return "bitwise and";
    case Reduction::kBor:
      return "bitwise or";
    case Reduction::kBxor:
      return "bitwise xor";
  }
  return "?";
}

}  // namespace

Group::Group(Layout layout, std::vector<Member> members, std::size_t me)
    : layout_(layout),
      members_(std::move(members)),
      me_(me),
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
  operand_.store(call.operand, std::memory_order_relaxed);
  deadline_ = deadline;
  first_ = now_ + 1;
  compared_ = false;
  check_current();
  layout_.rank(me_).calls[count() % kCallsKept].write(first_, calls_[me_]);
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
}

void Group::compare_so_far() {
  for (std::size_t i = 0; i < size(); ++i) {
    const RankBlock& block = layout_.rank(i);
    Call call;
    // Read once: by a second time it may have been replaced, by one many calls ahead.
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

// ---- waiting, and what may come of it --------------------------------------------------

void Group::wait_slowly(std::size_t index, Time time) {
  Clock& clock = layout_.rank(index).clock;
  while (!clock.reached(time)) {
    const nanoseconds left = deadline_ - steady_clock::now();
    clock.sleep(time, std::clamp(left, nanoseconds(0), kLookAround));
    if (!clock.reached(time)) find_fault(index, time);
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
    if (block.clock.reached(time)) continue;  // it had done its part before
    // One that leaves is often about to end, and how it ends says more.
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

void Group::compare_with(std::size_t index) {
  const RankBlock& block = layout_.rank(index);
  if (!block.calls[count() % kCallsKept].read(first_, calls_[index])) {
    // It is many calls ahead that wait for nobody. If it waited in this one, it has compared, so it
    // called the same; it can not have compared in a later one, which this rank has not begun.
    // Nobody needs to know then where its operand was: it could not go on before that was read.
    if (block.agreed.load(std::memory_order_relaxed) == first_) {
      calls_[index] = calls_[me_];
      calls_[index].operand = Call::kElsewhere;
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

// Where others will read and write: a stray write in one rank must not become one in all.
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

// What a peer that is stopped in the midst of the collective may still write to.
void Group::retire_operand() const {
  const std::uint64_t operand = operand_.load(std::memory_order_relaxed);
  if (operand != Call::kElsewhere) Heap::mine().retire(operand);
}

std::string Group::describe_difference(const std::string& one,
                                       const Call& its_call,
                                       const std::string& other,
                                       const Call& others_call) const {
  const bool differ_in_label = its_call.label != others_call.label;
  const auto part = [&](const std::string& who, const Call& call) {
    std::string text = who + " called " + describe(call);
    if (differ_in_label && call.label == 0) text += ", for " + describe_label(0);
    return text;
  };
  std::string text = part(one, its_call) + ", " + part(other, others_call);
  const std::uint32_t owner = Label::owner_of(its_call.label);
  const std::uint32_t others_owner = Label::owner_of(others_call.label);
  if (owner != others_owner && owner != 0 && others_owner != 0) {
    text +=
        "; the losses of several wrapped models must be built and run in the same order on all "
        "ranks";
  }
  return text;
}

std::string Group::describe(const Call& call) const {
  std::string text = name_of(call.kind);
  const bool has_root = call.kind == Kind::kBroadcast || call.kind == Kind::kReduce ||
                        call.kind == Kind::kGather || call.kind == Kind::kScatter;
  if (has_root) text += " with root " + std::to_string(call.root);
  if (call.kind != Kind::kBarrier && call.kind <= Kind::kBroadcast && !call.elsewhere) {
    text += " of " + std::to_string(call.numel) + " " + name_of(call.element);
    if (call.type != TypeName{}) text += " in " + printable(call.type);
    if (call.kind == Kind::kAllReduce || call.kind == Kind::kReduceScatter)
      text += std::string(", ") + name_of(call.reduction);
  }
  if (call.elsewhere && call.kind <= Kind::kBroadcast) text += ", handed to another backend";
  if (call.label != 0) text += ", for " + describe_label(call.label);
  return text;
}

std::string Group::describe_current() const {
  return "collective " + std::to_string(count()) + " (" + describe(calls_[me_]) + ")";
}

// ---- faults ----------------------------------------------------------------------------

bool Group::is_broken() const {
  return layout_.header().verdict.is.load(std::memory_order_acquire) != Verdict::Is::kNone;
}

void Group::check() const {
  if (is_broken()) throw_verdict("the group");
}

void Group::check_current() const {
  if (is_broken()) throw_verdict(describe_current());
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
  // Who was killed is often the reason why others have ended.
  abort(killed + (killed.empty() || others.empty() ? "" : ", ") + others);
  check();
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
  // Whoever writes it may have died over it.
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
