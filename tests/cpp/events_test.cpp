#include "core/events.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "event_ring.h"

namespace events = fastddp::events;
using event_ring::Ring;
using events::Kind;

namespace {

template <typename Body>
void in_threads(std::size_t count, const Body& body) {
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) threads.emplace_back([&body, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

TEST(without_a_ring_nothing_is_recorded) {
  Ring ring(4);
  events::record(Kind::kError);
  CHECK(ring.next() == 0);
}

TEST(an_event_has_its_time_number_owner_and_values) {
  Ring ring(4);
  ring.use();
  const std::uint64_t before = events::now();
  events::record(Kind::kRoundBegin, 0xFFFFFFFF, 5, ~std::uint64_t{0});
  events::record_at(7, Kind::kInterrupted, 0, 1, 2);
  CHECK(ring.next() == 2);
  CHECK(ring.word(0, 0) >= before && ring.word(0, 0) <= events::now());
  CHECK(ring.kind(0) == Kind::kRoundBegin && ring.number(0) == 0 && ring.owner(0) == 0xFFFFFFFF);
  CHECK(ring.word(0, 2) == 5 && ring.word(0, 3) == ~std::uint64_t{0});
  CHECK(ring.word(1, 0) == 7 && ring.word(1, 1) == (18 | 1 << 8));
  CHECK(ring.word(1, 2) == 1 && ring.word(1, 3) == 2);
}

TEST(new_events_take_the_places_of_the_oldest) {
  Ring ring(4);
  ring.use();
  for (std::uint64_t i = 0; i < 10; ++i) events::record(Kind::kLaunch, 0, i);
  CHECK(ring.next() == 10);
  for (std::size_t i = 6; i < 10; ++i) CHECK(ring.number(i) == i && ring.word(i, 2) == i);
}

TEST(threads_write_side_by_side) {
  constexpr std::size_t kThreads = 4;
  constexpr std::uint64_t kEach = 4000;
  Ring ring(std::size_t{1} << 14);
  ring.use();
  in_threads(kThreads, [](std::size_t thread) {
    for (std::uint64_t i = 0; i < kEach; ++i)
      events::record(Kind::kLaunch, static_cast<std::uint32_t>(thread), i, thread << 32 | i);
  });
  CHECK(ring.next() == kThreads * kEach);
  std::set<std::uint64_t> seen;
  for (std::size_t i = 0; i < kThreads * kEach; ++i) {
    CHECK(ring.number(i) == i && ring.kind(i) == Kind::kLaunch);
    CHECK(ring.word(i, 3) == (ring.owner(i) << 32 | ring.word(i, 2)));
    seen.insert(ring.word(i, 3));
  }
  CHECK(seen.size() == kThreads * kEach);
}

// The value of an event is made from its number, so a torn one would show.
TEST(a_reader_sees_whole_events_or_none) {
  constexpr std::uint64_t kEvents = 20000;
  constexpr std::size_t kCapacity = 8;
  Ring ring(kCapacity);
  ring.use();
  std::atomic<bool> over{false};
  std::uint64_t torn = 0;
  std::thread reader([&] {
    while (!over) {
      for (std::size_t i = 0; i < kCapacity; ++i) {
        const std::uint64_t number = ring.number(i);
        const std::uint64_t a = ring.word(i, 2);
        const std::uint64_t b = ring.word(i, 3);
        const std::uint64_t next = ring.next();
        if (number % kCapacity != i || number >= next || number + kCapacity < next) continue;
        if (ring.kind(i) != Kind::kLaunch || ring.number(i) != number) continue;
        if (a != number || b != 3 * number) ++torn;
      }
    }
  });
  for (std::uint64_t i = 0; i < kEvents; ++i) events::record(Kind::kLaunch, 0, i, 3 * i);
  over = true;
  reader.join();
  CHECK(torn == 0 && ring.next() == kEvents);
}

TEST(threads_go_on_in_another_ring) {
  constexpr std::uint64_t kEach = 2000;
  Ring one(std::size_t{1} << 13);
  Ring two(std::size_t{1} << 13);
  one.use();
  std::atomic<bool> half{false};
  std::thread switcher([&] {
    while (!half) std::this_thread::yield();
    two.use();
  });
  in_threads(2, [&](std::size_t thread) {
    for (std::uint64_t i = 0; i < kEach; ++i) {
      if (thread == 0 && i == kEach / 2) half = true;
      events::record(Kind::kLaunch);
    }
  });
  switcher.join();
  events::record(Kind::kLaunch);
  CHECK(one.next() + two.next() == 2 * kEach + 1);
  CHECK(two.next() > 0);
}

int main() { return check::run(); }
