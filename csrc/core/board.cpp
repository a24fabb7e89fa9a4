#include "core/board.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "core/events.h"

namespace fastddp::board {
namespace {

using Word = std::atomic<std::uint64_t>;
static_assert(sizeof(Word) == sizeof(std::uint64_t) && Word::is_always_lock_free,
              "Python writes plain 64-bit words");

std::atomic<Word*> words{nullptr};

// Which places of this process are taken, whether or not there is a board yet.
std::atomic<std::uint32_t> models_taken{0};
std::atomic<std::uint32_t> waits_taken{0};

constexpr auto kRelaxed = std::memory_order_relaxed;

constexpr std::uint64_t kInterrupted = 1;  // Ending.INTERRUPTED in fastddp/watch/layout.py

// The kernel's number of this thread, asked for once, and again after a fork.
std::atomic<std::uint64_t> generation{0};

std::uint64_t this_thread() {
  thread_local std::uint64_t asked = ~std::uint64_t{0};
  thread_local std::uint64_t me = 0;
  if (const std::uint64_t now = generation.load(kRelaxed); asked != now) {
    asked = now;
    me = static_cast<std::uint64_t>(::syscall(SYS_gettid));
  }
  return me;
}

std::size_t take(std::atomic<std::uint32_t>& taken, std::size_t places) {
  std::uint32_t before = taken.load(kRelaxed);
  while (true) {
    std::size_t place = 0;
    while (place < places && (before >> place & 1) != 0) ++place;
    if (place == places) return places;
    if (taken.compare_exchange_weak(before, before | std::uint32_t{1} << place)) return place;
  }
}

void give_back(std::atomic<std::uint32_t>& taken, std::size_t place, std::size_t places) {
  if (place < places) taken.fetch_and(~(std::uint32_t{1} << place));
}

}  // namespace

void use(void* memory) {
  words.store(static_cast<Word*>(memory), std::memory_order_release);
  generation.fetch_add(1);
  if (memory == nullptr) waits_taken = 0;  // a forked child has none of its parent's other threads
}

void note_issuer() {
  Word* const board = words.load(std::memory_order_acquire);
  if (board == nullptr) return;
  if (board[kEnding].load(kRelaxed) == kInterrupted) board[kEnding].store(0, kRelaxed);  // goes on
  const std::uint64_t me = this_thread();
  if (board[kIssuer].load(kRelaxed) == me) return;
  const std::uint64_t before = board[kIssuer].exchange(me, kRelaxed);
  if (before != 0 && before != me) board[kHandOvers].fetch_add(1, kRelaxed);
}

void note_interrupt() {
  std::uint64_t none = 0;  // a process that is ending stays so
  if (Word* const board = words.load(std::memory_order_acquire); board != nullptr)
    board[kEnding].compare_exchange_strong(none, kInterrupted);
}

// ---- models ----------------------------------------------------------------------------

ModelPlace::ModelPlace(std::uint32_t owner, std::uint64_t group)
    : owner_(owner), group_(group), place_(take(models_taken, kNativeModels)) {
  set_phase(Phase::kBetween, 0);
}

ModelPlace::~ModelPlace() {
  put(kOwner, 0);
  give_back(models_taken, place_, kNativeModels);
}

// The first two as well, since the board may be younger than the model.
void ModelPlace::set_phase(Phase phase, std::uint64_t steps) {
  put(kOwner, owner_);
  put(kGroup, group_);
  put(kPhase, static_cast<std::uint64_t>(phase));
  put(kSteps, steps);
  if (phase == Phase::kFilling) {
    put(kLastParam, 0);
    put(kLaunched, 0);
  }
  put(kChanged, events::now());
}

void ModelPlace::put(Model word, std::uint64_t value) {
  Word* const board = words.load(std::memory_order_acquire);
  if (board == nullptr || place_ == kNativeModels) return;
  board[kModelsAt + place_ * kModelWords + word].store(value, kRelaxed);
}

// ---- waits -----------------------------------------------------------------------------

WaitPlace::WaitPlace() : place_(take(waits_taken, kNativeWaits)) {}

WaitPlace::~WaitPlace() {
  write({}, {});
  give_back(waits_taken, place_, kNativeWaits);
}

void WaitPlace::write(const std::array<std::uint64_t, kWaitWords>& wait, const std::string& text) {
  Word* const board = words.load(std::memory_order_acquire);
  if (board == nullptr || place_ == kNativeWaits) return;
  Word* const place = board + kWaitsAt + place_ * kWaitStride;
  const std::uint64_t sequence = place[kSequence].load(kRelaxed) | 1;
  place[kSequence].store(sequence, kRelaxed);
  // Released one by one: who sees any of them also sees that the sequence is odd, or has moved on.
  for (std::size_t i = kSince; i < kWaitWords; ++i)
    place[i].store(wait[i], std::memory_order_release);
  std::array<char, kTextBytes> bytes{};
  std::copy_n(text.data(), std::min(text.size(), bytes.size() - 1), bytes.data());
  for (std::size_t i = 0; i < kTextBytes / sizeof(std::uint64_t); ++i) {
    std::uint64_t word = 0;
    std::copy_n(bytes.data() + i * sizeof(word), sizeof(word), reinterpret_cast<char*>(&word));
    place[kWaitWords + i].store(word, std::memory_order_release);
  }
  place[kSequence].store(sequence + 1, std::memory_order_release);
}

}  // namespace fastddp::board
