#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "shm/clock.h"
#include "shm/layout.h"
#include "shm_ranks.h"

using fastddp::Element;
using fastddp::Reduction;
using fastddp::shm::Call;
using fastddp::shm::Clock;
using fastddp::shm::Kind;
using fastddp::shm::Layout;
using fastddp::shm::PublishedCall;
using fastddp::shm::Time;
using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

namespace {

// Makes a call of which every member depends on the number, so that a mixture of two calls shows.
Call numbered(Time number) {
  return {.kind = static_cast<Kind>(number % 10),
          .element = static_cast<Element>(number % 7),
          .reduction = static_cast<Reduction>(number % 5),
          .root = static_cast<std::uint32_t>(number),
          .numel = number * 3,
          .operand = number * 5};
}

bool same(const Call& a, const Call& b) { return a.agrees_with(b) && a.operand == b.operand; }

}  // namespace

TEST(a_sleeper_is_woken_by_the_clock) {
  Clock clock;
  std::atomic<bool> woken{false};
  std::thread sleeper([&] {
    while (!clock.reached(1)) clock.sleep(1, seconds(100));
    woken = true;
  });
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(!woken);
  clock.advance_to(1);
  sleeper.join();
  CHECK(woken && clock.now() == 1);
}

TEST(a_sleeper_is_woken_though_no_time_has_passed) {
  Clock clock;
  std::atomic<bool> woken{false};
  std::thread sleeper([&] {
    clock.sleep(1, seconds(100));
    woken = true;
  });
  ranks::wait_until([&] {
    clock.wake();
    return woken.load();
  });
  sleeper.join();
  CHECK(!clock.reached(1));
}

TEST(sleeping_and_spinning_end_with_their_limit) {
  Clock clock;
  clock.sleep(1, milliseconds(5));
  clock.sleep(1, milliseconds(0));
  CHECK(!clock.spin(1, milliseconds(1)));
  clock.advance_to(1);
  clock.sleep(1, seconds(100));  // reached, so no sleep at all
  CHECK(clock.spin(1, milliseconds(0)));
}

// Sleeps take up to 100 seconds, so a lost wake-up makes the test time out.
TEST(no_wake_up_is_lost) {
  constexpr Time kTimes = 20000;
  Clock left;
  Clock right;
  const auto run = [](Clock& mine, Clock& other) {
    for (Time time = 1; time <= kTimes; ++time) {
      mine.advance_to(time);
      while (!other.reached(time)) other.sleep(time, seconds(100));
    }
  };
  std::thread thread([&] { run(right, left); });
  run(left, right);
  thread.join();
}

TEST(what_was_written_before_a_step_is_seen_after_it) {
  Clock clock;
  Clock answer;
  std::uint64_t value = 0;  // plain memory: a thread sanitizer checks the order
  constexpr Time kTimes = 5000;
  std::thread reader([&] {
    for (Time time = 1; time <= kTimes; ++time) {
      while (!clock.spin(time, std::chrono::microseconds(1))) clock.sleep(time, seconds(100));
      if (value == time * 7) answer.advance_to(time);
    }
  });
  for (Time time = 1; time <= kTimes; ++time) {
    value = time * 7;
    clock.advance_to(time);
    while (!answer.reached(time)) answer.sleep(time, seconds(100));
  }
  reader.join();
}

TEST(a_published_call_comes_back_whole) {
  PublishedCall published;
  Call call;
  CHECK(!published.read(4, call));
  published.write(4, numbered(4));
  CHECK(published.read(4, call) && same(call, numbered(4)));
  published.write(20, numbered(20));
  CHECK(!published.read(4, call));
  CHECK(published.read(20, call) && same(call, numbered(20)));
  const Call largest{.kind = Kind::kUnknown,
                     .element = Element::kBool,
                     .reduction = Reduction::kBxor,
                     .root = UINT32_MAX,
                     .numel = UINT64_MAX,
                     .operand = Call::kElsewhere};
  published.write(21, largest);
  CHECK(published.read(21, call) && same(call, largest));
}

TEST(a_call_that_is_being_replaced_is_never_read_in_parts) {
  PublishedCall published;
  std::atomic<bool> done{false};
  std::atomic<Time> newest{0};
  std::atomic<int> torn{0};
  std::atomic<int> read{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      while (!done) {
        const Time number = newest.load();
        Call call;
        if (!published.read(number, call)) continue;
        read.fetch_add(1);
        if (number != 0 && !same(call, numbered(number))) torn.fetch_add(1);
      }
    });
  }
  const auto end = steady_clock::now() + milliseconds(300);
  for (Time number = 1; steady_clock::now() < end; ++number) {
    published.write(number, numbered(number));
    newest = number;
    if (number % 64 == 0) std::this_thread::yield();
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  CHECK(torn == 0);
  CHECK(read > 0);
}

TEST(calls_agree_by_all_but_where_the_operands_lie) {
  const Call call = numbered(8);
  Call other = call;
  other.operand = 1;
  CHECK(call.agrees_with(other));
  other = call;
  other.kind = Kind::kBroadcast;
  CHECK(!call.agrees_with(other));
  other = call;
  other.element = Element::kInt8;
  CHECK(!call.agrees_with(other));
  other = call;
  other.reduction = Reduction::kMax;
  CHECK(!call.agrees_with(other));
  other = call;
  other.root = 1;
  CHECK(!call.agrees_with(other));
  other = call;
  other.numel = 1;
  CHECK(!call.agrees_with(other));
}

TEST(the_parts_of_a_layout_do_not_overlap) {
  for (std::size_t ranks = 1; ranks <= 9; ++ranks) {
    std::vector<char> memory(Layout::bytes(ranks));
    const Layout layout(memory.data(), ranks);
    const char* end = memory.data() + sizeof(fastddp::shm::Header);
    for (std::size_t i = 0; i < ranks; ++i) {
      const auto* block = reinterpret_cast<const char*>(&layout.rank(i));
      CHECK(block >= end && (block - memory.data()) % 64 == 0);
      end = block + sizeof(fastddp::shm::RankBlock);
    }
    for (std::size_t i = 0; i < ranks; ++i) {
      for (std::size_t slot = 0; slot < fastddp::shm::kSlots; ++slot) {
        CHECK(layout.slot(i, slot) >= end && (layout.slot(i, slot) - memory.data()) % 64 == 0);
        end = layout.slot(i, slot) + fastddp::shm::kSlotBytes;
      }
    }
    for (std::size_t i = 0; i < ranks; ++i) {
      for (std::size_t peer = 0; peer < ranks; ++peer) {
        for (const auto which : {fastddp::shm::End::kSender, fastddp::shm::End::kReceiver}) {
          const auto* log = reinterpret_cast<const char*>(&layout.messages(i, peer, which));
          CHECK(log >= end && (log - memory.data()) % 64 == 0);
          end = log + sizeof(fastddp::shm::MessageLog);
        }
      }
    }
    CHECK(end == memory.data() + memory.size());
  }
}

TEST(construction_keeps_the_nonce) {
  const auto segment = ranks::make_control(3);
  const fastddp::shm::Address address = segment.address();
  const auto& header = Layout(segment.data(), 3).header();
  CHECK(header.nonce == address.nonce);
  CHECK(header.version == fastddp::shm::kLayoutVersion && header.ranks == 3);
  CHECK(header.verdict.is.load() == fastddp::shm::Verdict::Is::kNone);
}

int main() { return check::run(); }
