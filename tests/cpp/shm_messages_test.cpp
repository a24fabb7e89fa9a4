#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <thread>

#include "check.h"
#include "shm/layout.h"
#include "shm/messages.h"
#include "shm_ranks.h"

using fastddp::shm::End;
using fastddp::shm::kMessagesKept;
using fastddp::shm::kStreamsKept;
using fastddp::shm::Layout;
using fastddp::shm::Messages;

namespace {

constexpr std::optional<std::uint64_t> kNothing;

// Rank 0 sends, rank 1 receives, and rank 2 takes no part.
struct Ends {
  const fastddp::shm::Segment control = ranks::make_control(3);
  const Layout layout{control.data(), 3};
  Messages sender{layout, 3, 0};
  Messages receiver{layout, 3, 1};
  Messages other{layout, 3, 2};

  auto sends(std::uint32_t tag, std::uint64_t bytes) {
    return sender.announce(End::kSender, 1, tag, bytes);
  }
  auto receives(std::uint32_t tag, std::uint64_t bytes) {
    return receiver.announce(End::kReceiver, 0, tag, bytes);
  }
};

}  // namespace

TEST(whoever_comes_second_learns_of_the_first) {
  Ends ends;
  CHECK(ends.sends(0, 4) == kNothing);
  CHECK(ends.receives(0, 8) == 4);
  CHECK(ends.receives(0, 0) == kNothing);
  CHECK(ends.sends(0, 4) == 0);
}

TEST(messages_are_told_apart_by_peers_direction_tag_and_order) {
  Ends ends;
  CHECK(ends.sends(0, 1) == kNothing);
  CHECK(ends.sends(0, 2) == kNothing);
  CHECK(ends.sends(7, 3) == kNothing);
  CHECK(ends.other.announce(End::kSender, 1, 0, 4) == kNothing);
  CHECK(ends.receiver.announce(End::kSender, 0, 0, 5) == kNothing);
  CHECK(ends.receives(7, 9) == 3);
  CHECK(ends.receives(0, 9) == 1);
  CHECK(ends.receives(0, 9) == 2);
  CHECK(ends.receives(0, 9) == kNothing);
  CHECK(ends.receiver.announce(End::kReceiver, 2, 0, 9) == 4);
  CHECK(ends.sender.announce(End::kReceiver, 1, 0, 9) == 5);
}

TEST(what_is_withdrawn_was_never_announced) {
  Ends ends;
  CHECK(ends.sends(0, 1) == kNothing);
  ends.sender.withdraw();
  ends.sender.withdraw();
  CHECK(ends.receives(0, 2) == kNothing);
  CHECK(ends.sends(0, 2) == 2);
}

TEST(one_that_takes_from_anybody_is_not_compared_any_more) {
  Ends ends;
  CHECK(ends.sends(0, 1) == kNothing);
  CHECK(ends.sends(1, 1) == kNothing);
  ends.receiver.take_from_anybody(0);
  CHECK(ends.receives(0, 2) == kNothing);
  ends.receiver.withdraw();
  CHECK(ends.receives(1, 2) == 1);
  // Also under more tags than are counted.
  for (std::uint32_t tag = 2; tag < 2 * kStreamsKept; ++tag) ends.receiver.take_from_anybody(tag);
  for (std::uint32_t tag = 2; tag < 2 * kStreamsKept; ++tag) {
    CHECK(ends.sends(tag, 1) == kNothing);
    CHECK(ends.receives(tag, 2) == kNothing);
  }
}

TEST(what_is_too_old_or_of_too_many_tags_is_not_compared) {
  Ends ends;
  for (std::size_t i = 0; i <= kMessagesKept; ++i) CHECK(ends.sends(0, i) == kNothing);
  CHECK(ends.receives(0, 99) == kNothing);  // the first
  for (std::size_t i = 1; i <= kMessagesKept; ++i) CHECK(ends.receives(0, 99) == i);
  for (std::uint32_t tag = 1; tag < 2 * kStreamsKept; ++tag) {
    CHECK(ends.sends(tag, 1) == kNothing);
    CHECK(ends.receives(tag, 2) ==
          (tag < kStreamsKept ? std::optional<std::uint64_t>(1) : kNothing));
  }
}

TEST(of_two_that_come_at_once_at_least_one_sees_the_other) {
  Ends ends;
  constexpr std::size_t kRounds = 3000;
  std::atomic<std::size_t> arrived{0};
  const auto meet = [&](std::size_t round, std::size_t point) {
    arrived.fetch_add(1);
    while (arrived.load() < 4 * round + 2 * point) std::this_thread::yield();
  };
  std::array<bool, kRounds> seen{};
  std::thread other([&] {
    for (std::size_t i = 0; i < kRounds; ++i) {
      meet(i, 1);
      seen[i] = ends.receives(0, i) == i + 1;
      meet(i, 2);
    }
  });
  for (std::size_t i = 0; i < kRounds; ++i) {
    meet(i, 1);
    const bool mine = ends.sends(0, i + 1) == i;
    meet(i, 2);
    CHECK(mine || seen[i]);
  }
  other.join();
}

int main() { return check::run(); }
