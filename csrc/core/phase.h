// Where a reducer is in the life of a round, and which moves from there are legal.
//
//   kBetween -> kFilling     a round begins
//   kFilling -> kBetween     its backward is over, or has raised
//   kFilling -> kInFlight    the backward of a manual round is over
//   kFilling -> kFinalized   finalize() was called within the backward
//   kInFlight -> kBetween    finalize() was called after the backward
//   kFinalized -> kBetween   the backward is over
//
// A move that is not listed here would begin a second round over one that is under way, and the
// ranks would launch different collectives: it is an error that names both phases.
// `fastddp/engine/python/phase.py` is the same in Python. (tests/cpp/core_test.cpp)
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastddp {

enum class Phase {
  kBetween,    // no round is under way
  kFilling,    // backward brings gradients
  kInFlight,   // backward is over, everything is launched, and finalize() is to come
  kFinalized,  // finalize() has come, but the backward is not over yet
};

// For messages.
constexpr const char* describe(Phase phase) {
  switch (phase) {
    case Phase::kBetween:
      return "BETWEEN (between rounds)";
    case Phase::kFilling:
      return "FILLING (backward brings gradients)";
    case Phase::kInFlight:
      return "IN_FLIGHT (backward is over, all is launched, and finalize() is to come)";
    case Phase::kFinalized:
      return "FINALIZED (finalize() has come, but the backward is not over yet)";
  }
  return "unknown";
}

constexpr bool is_legal_move(Phase from, Phase to) {
  switch (from) {
    case Phase::kBetween:
      return to == Phase::kFilling;
    case Phase::kFilling:
      return to != Phase::kFilling;
    case Phase::kInFlight:
    case Phase::kFinalized:
      return to == Phase::kBetween;
  }
  return false;
}

// The phase of one reducer. Any thread may read it; it moves under the reducer's mutex.
class CurrentPhase {
 public:
  Phase get() const { return phase_; }
  bool is(Phase phase) const { return phase_ == phase; }

  // Throws std::logic_error unless the move is legal.
  void check_move(Phase to) const {
    const Phase from = phase_;
    if (!is_legal_move(from, to))
      throw std::logic_error(std::string("fastddp: a reducer cannot go from phase ") +
                             describe(from) + " to phase " + describe(to));
  }

  void move_to(Phase to) {
    check_move(to);
    phase_ = to;
  }

 private:
  std::atomic<Phase> phase_{Phase::kBetween};
};

}  // namespace fastddp
