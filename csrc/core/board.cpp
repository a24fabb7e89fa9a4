#include "core/board.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <limits>

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

std::uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace

void use(void* memory) { words.store(static_cast<Word*>(memory), std::memory_order_release); }

void note_issuer() {
  Word* const board = words.load(std::memory_order_acquire);
  if (board == nullptr) return;
  thread_local const auto me = static_cast<std::uint64_t>(::syscall(SYS_gettid));
  const std::uint64_t before = board[kIssuer].load(kRelaxed);
  if (before == me) return;
  board[kIssuer].store(me, kRelaxed);
  if (before != 0) board[kHandOvers].fetch_add(1, kRelaxed);
}

void note_interrupt() {
  constexpr std::uint64_t kInterrupted = 1;  // Ending.INTERRUPTED in fastddp/watch/layout.py
  if (Word* const board = words.load(std::memory_order_acquire); board != nullptr)
    board[kEnding].store(kInterrupted, kRelaxed);
}

// ---- models ----------------------------------------------------------------------------

ModelPlace::ModelPlace(std::uint32_t owner, std::uint64_t group)
    : owner_(owner), group_(group), place_(take(models_taken, kNativeModels)) {
  set_phase(0, 0);
}

ModelPlace::~ModelPlace() {
  put(kOwner, 0);
  give_back(models_taken, place_, kNativeModels);
}

// All words but the last parameter, since the board may be younger than the model.
void ModelPlace::set_phase(std::uint64_t phase, std::uint64_t steps) {
  put(kOwner, owner_);
  put(kGroup, group_);
  put(kPhase, phase);
  put(kSteps, steps);
  put(kLastParam, 0);
  put(kLaunched, 0);
  put(kChanged, monotonic_ns());
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
