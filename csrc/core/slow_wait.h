// A wait that has lasted longer than one look-around: from then on it is on the board, a signal of
// the script's ends it, and so does an order from outside.
//
// Whoever waits looks around every kLookAround, and makes one of these at the first time. So a wait
// that is over sooner costs nothing.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/board.h"

namespace fastddp {

constexpr std::chrono::milliseconds kLookAround{50};

// What a signal handler of the script has raised. Not derived from std::exception, because the
// exception that is thrown is also Python's own, which is.
class Interruption {
 public:
  Interruption() = default;
  Interruption(const Interruption&) = default;
  Interruption& operator=(const Interruption&) = default;
  virtual ~Interruption() = default;
  // Returns the name of the exception, such as "KeyboardInterrupt".
  virtual std::string name() const = 0;
};

// Has `check` called by each look-around of each wait. It may take the GIL, and so wait for a
// thread of the script that holds it; whoever looks around holds no lock that such a thread takes.
// It throws an Interruption if a signal handler has raised; it returns at once in threads that do
// not handle signals.
void set_signal_check(void (*check)());

// What a wait that was ordered to fail throws, with the text of the order.
class WaitFailed final : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class SlowWait {
 public:
  struct What {
    board::Source source;
    std::uint64_t group = 0;   // board::id_of() its name
    std::uint64_t number = 0;  // of the collective in the group, if that is known
    std::uint64_t label = 0;   // see shm/label.h
  };

  // `lasted`: for how long it has been waited for already.
  SlowWait(const What& what, std::string text, std::chrono::nanoseconds lasted);
  ~SlowWait();
  SlowWait(const SlowWait&) = delete;
  SlowWait& operator=(const SlowWait&) = delete;

  // Brings the board up to date. Throws an Interruption or WaitFailed if the wait is to end.
  // `missing`, `unfinished`: see board::Wait.
  void look(std::uint64_t missing = 0, std::uint64_t unfinished = 0);

 private:
  const std::string text_;
  board::WaitPlace place_;
  std::array<std::uint64_t, board::kWaitWords> words_{};
};

// Orders the wait at a place of the board to throw WaitFailed at its next look-around. Returns
// false if the wait that began at `since_ns` is over.
bool fail_wait(std::size_t place, std::uint64_t since_ns, const std::string& text);

}  // namespace fastddp
