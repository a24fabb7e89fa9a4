#include "core/events.h"

#include <atomic>
#include <cstddef>
#include <ctime>

namespace fastddp::events {
namespace {

using Word = std::atomic<std::uint64_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == sizeof(std::uint64_t));

constexpr std::size_t kCapacity = 1;  // in the header: how many events there is room for
constexpr std::size_t kNext = 2;      // in the header: how many events were ever begun
constexpr std::size_t kHeaderWords = 16;
constexpr std::size_t kEventWords = 4;
constexpr std::uint64_t kNumberMask = 0xFFFFFF;

std::atomic<Word*> ring{nullptr};

}  // namespace

void use(void* address) { ring.store(static_cast<Word*>(address), std::memory_order_release); }

std::uint64_t now() {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(time.tv_nsec);
}

void record_at(
    std::uint64_t time, Kind kind, std::uint32_t owner, std::uint64_t a, std::uint64_t b) {
  Word* const words = ring.load(std::memory_order_acquire);
  if (words == nullptr) return;
  const std::uint64_t number = words[kNext].fetch_add(1, std::memory_order_relaxed);
  const std::uint64_t mask = words[kCapacity].load(std::memory_order_relaxed) - 1;
  Word* const event = words + kHeaderWords + (number & mask) * kEventWords;
  // Releases, so that a reader that sees a part of this event also sees that the event before it,
  // in the same place, does not count any more. The word with the number comes last: it says that
  // the event is whole.
  event[0].store(time, std::memory_order_release);
  event[2].store(a, std::memory_order_release);
  event[3].store(b, std::memory_order_release);
  event[1].store(
      static_cast<std::uint64_t>(kind) | (number & kNumberMask) << 8 | std::uint64_t{owner} << 32,
      std::memory_order_release);
}

void record(Kind kind, std::uint32_t owner, std::uint64_t a, std::uint64_t b) {
  if (ring.load(std::memory_order_relaxed) != nullptr) record_at(now(), kind, owner, a, b);
}

}  // namespace fastddp::events
