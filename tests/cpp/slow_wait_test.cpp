// The board as C++ writes it, and what ends a slow wait: a signal, or an order.
#include "core/slow_wait.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/board.h"
#include "core/outcome.h"
#include "core/turns.h"

using fastddp::fail_wait;
using fastddp::Interruption;
using fastddp::kLookAround;
using fastddp::Outcome;
using fastddp::Phase;
using fastddp::set_signal_check;
using fastddp::SlowWait;
using fastddp::Turns;
using fastddp::WaitFailed;
using std::chrono::milliseconds;
namespace board = fastddp::board;

namespace {

using Words = std::array<std::atomic<std::uint64_t>, board::kWords>;

// A board that this process writes to as long as the object lives.
class Board {
 public:
  Board() { board::use(words_->data()); }
  ~Board() { board::use(nullptr); }
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  std::uint64_t header(board::Header word) const { return (*words_)[word]; }
  std::uint64_t model(std::size_t place, board::Model word) const {
    return (*words_)[board::kModelsAt + place * board::kModelWords + word];
  }
  std::uint64_t wait(std::size_t place, std::size_t word) const {
    return (*words_)[board::kWaitsAt + place * board::kWaitStride + word];
  }
  std::string text(std::size_t place) const {
    std::string bytes;
    for (std::size_t i = 0; i < board::kTextBytes / 8; ++i) {
      const std::uint64_t word = wait(place, board::kWaitWords + i);
      bytes.append(reinterpret_cast<const char*>(&word), sizeof(word));
    }
    return bytes.substr(0, std::strlen(bytes.c_str()));
  }

 private:
  const std::unique_ptr<Words> words_ = std::make_unique<Words>();
};

class Raised final : public std::runtime_error, public Interruption {
 public:
  Raised() : std::runtime_error("raised by a handler") {}
  std::string name() const override { return "KeyboardInterrupt"; }
};

std::atomic<std::thread::id> interrupted{};

void check_signals() {
  if (interrupted.load() == std::this_thread::get_id()) throw Raised();
}

// Has a signal handler raise in the calling thread as long as the object lives.
class Interrupted {
 public:
  Interrupted() {
    set_signal_check(&check_signals);
    interrupted = std::this_thread::get_id();
  }
  ~Interrupted() {
    interrupted = std::thread::id();
    set_signal_check(nullptr);
  }
  Interrupted(const Interrupted&) = delete;
  Interrupted& operator=(const Interrupted&) = delete;
};

template <typename Error, typename Body>
std::string text_thrown_by(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

constexpr SlowWait::What kWhat{board::Source::kShm, 7, 8, 9};

}  // namespace

TEST(a_wait_is_on_the_board_from_its_first_look_to_its_end) {
  const Board board;
  {
    SlowWait wait(kWhat, "an all-reduce", milliseconds(30));
    CHECK(board.wait(0, board::kSince) == 0);
    wait.look(0b100, 0b10);
    CHECK(board.wait(0, board::kSequence) % 2 == 0);
    CHECK(board.wait(0, board::kSince) != 0);
    CHECK(board.wait(0, board::kWaitGroup) == 7);
    CHECK(board.wait(0, board::kNumber) == 8);
    CHECK(board.wait(0, board::kLabel) == 9);
    CHECK(board.wait(0, board::kSource) == 1);
    CHECK(board.wait(0, board::kMissing) == 0b100);
    CHECK(board.wait(0, board::kUnfinished) == 0b10);
    CHECK(board.text(0) == "an all-reduce");
    SlowWait another(kWhat, std::string(2 * board::kTextBytes, 'x'), milliseconds(0));
    another.look();
    CHECK(board.text(1) == std::string(board::kTextBytes - 1, 'x'));
    CHECK(board.text(0) == "an all-reduce");
  }
  CHECK(board.wait(0, board::kSince) == 0);
  CHECK(board.text(1).empty());
}

TEST(more_waits_than_places_go_on_without_one) {
  const Board board;
  std::vector<std::unique_ptr<SlowWait>> waits;
  for (std::size_t i = 0; i < board::kNativeWaits + 1; ++i) {
    waits.push_back(std::make_unique<SlowWait>(kWhat, "many", milliseconds(0)));
    waits.back()->look();
  }
  CHECK(board.text(board::kNativeWaits - 1) == "many");
  CHECK(board.text(board::kNativeWaits).empty());  // this place is Python's
}

TEST(a_reader_never_sees_the_half_of_a_wait) {
  const Board board;
  std::atomic<bool> stop{false};
  auto writer = std::async(std::launch::async, [&] {
    for (std::uint64_t i = 1; !stop; ++i) {
      SlowWait wait({board::Source::kShm, i, i, i}, std::to_string(i), milliseconds(0));
      wait.look(i, i);
    }
  });
  int whole = 0;
  for (int i = 0; i < 200'000 && whole < 1'000; ++i) {
    const std::uint64_t before = board.wait(0, board::kSequence);
    const auto group = board.wait(0, board::kWaitGroup);
    const auto missing = board.wait(0, board::kMissing);
    const std::string text = board.text(0);
    if (before % 2 != 0 || board.wait(0, board::kSequence) != before) continue;
    CHECK(group == missing);
    CHECK(text == (group == 0 ? "" : std::to_string(group)));
    ++whole;
  }
  stop = true;
  writer.get();
  CHECK(whole > 0);
}

TEST(an_order_ends_the_wait_that_it_is_for_and_no_other) {
  const Board board;
  std::uint64_t first = 0;
  {
    SlowWait wait(kWhat, "", milliseconds(5));
    wait.look();
    first = board.wait(0, board::kSince);
    CHECK(!fail_wait(0, first + 1, "too early"));
    CHECK(!fail_wait(1, first, "elsewhere"));
    CHECK(!fail_wait(board::kWaits, first, "nowhere"));
    wait.look();
    CHECK(fail_wait(0, first, "because"));
    CHECK(text_thrown_by<WaitFailed>([&] { wait.look(); }) == "because");
    wait.look();
  }
  CHECK(!fail_wait(0, first, "over"));
}

TEST(a_signal_ends_a_wait_in_the_thread_that_handles_signals) {
  Outcome outcome;
  {
    const Interrupted interrupted;
    CHECK_THROWS(outcome.wait(milliseconds(0)), Raised);
    auto other = std::async(std::launch::async, [&] { return outcome.wait(3 * kLookAround); });
    CHECK(!other.get());
  }
  outcome.set(nullptr);
  CHECK(outcome.wait(milliseconds(0)));
}

TEST(a_turn_that_is_given_up_does_not_stop_those_behind_it) {
  const auto turns = std::make_shared<Turns>();
  std::promise<void> gate;
  turns->submit([&] { gate.get_future().wait(); });
  bool has_run = false;
  std::atomic<int> skipped{0};
  int seen_by_last = 0;
  const auto last = std::make_shared<Outcome>();
  {
    const Interrupted interrupted;
    const auto at_skip = [&] {
      turns->submit([&] { seen_by_last = skipped; }, last);
      gate.set_value();
      std::this_thread::sleep_for(kLookAround);  // what is behind must not begin before this ends
      ++skipped;
    };
    CHECK_THROWS((turns->run([&] { has_run = true; }, at_skip), 0), Raised);
  }
  CHECK(last->wait(milliseconds(30'000)));
  CHECK(seen_by_last == 1 && !has_run);
  turns->run([] {});
  CHECK(turns->stop(milliseconds(30'000)));
}

TEST(a_thread_knows_that_it_is_within_its_turn) {
  const auto turns = std::make_shared<Turns>();
  CHECK(!turns->is_within());
  turns->run([&] {
    CHECK(turns->is_within());
    CHECK(!std::async(std::launch::async, [&] { return turns->is_within(); }).get());
  });
  CHECK(!turns->is_within());
  CHECK_THROWS((turns->run([] { throw Raised(); }), 0), Raised);
  CHECK(!turns->is_within());
}

TEST(a_model_is_on_the_board_for_its_life) {
  const Board board;
  {
    board::ModelPlace model(11, 12);
    model.set_phase(Phase::kFilling, 5);
    model.set_last_param(3);
    model.set_launched(2);
    CHECK(board.model(0, board::kOwner) == 11);
    CHECK(board.model(0, board::kGroup) == 12);
    CHECK(board.model(0, board::kPhase) == 1);
    CHECK(board.model(0, board::kSteps) == 5);
    CHECK(board.model(0, board::kLastParam) == 4);
    CHECK(board.model(0, board::kLaunched) == 2);
    CHECK(board.model(0, board::kChanged) != 0);
    const board::ModelPlace second(13, 12);
    CHECK(board.model(1, board::kOwner) == 13);
  }
  CHECK(board.model(0, board::kOwner) == 0);
  CHECK(board.model(1, board::kOwner) == 0);
}

TEST(a_second_thread_that_begins_collectives_is_noted) {
  const Board board;
  board::note_issuer();
  board::note_issuer();
  CHECK(board.header(board::kIssuer) != 0);
  CHECK(board.header(board::kHandOvers) == 0);
  std::thread(board::note_issuer).join();
  CHECK(board.header(board::kHandOvers) == 1);
}

TEST(the_number_of_a_name_is_that_of_the_published_hash) {
  CHECK(board::id_of("") == 0xcbf29ce484222325);
  CHECK(board::id_of("a") == 0xaf63dc4c8601ec8c);  // from the authors' test vectors
}

int main() { return check::run(); }
