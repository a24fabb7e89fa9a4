// What this process has done lately: events in a ring of fixed size, which Python makes.
//
// `fastddp/watch/ring.py` has the layout and `fastddp/watch/events.py` says what each event is;
// tests/unit/test_events.py compares the two writers. Recording takes no lock, no system call and
// no memory, so it may be done anywhere: a number that no other thread gets, a reading of the
// clock, four stores.
#pragma once

#include <cstdint>

namespace fastddp::events {

enum class Kind : std::uint8_t {
  kForwardBegin = 1,
  kForwardEnd,
  kRoundBegin,
  kBackwardEnd,
  kFillBegin,
  kLaunch,
  kWaitBegin,
  kWaitEnd,
  kRoundEnd,
  kOptimizerBegin,
  kOptimizerEnd,
  kCollectiveBegin,
  kCollectiveMet,
  kCollectiveEnd,
  kError,
  kStallBegin,
  kStallEnd,
  kInterrupted,
};

// Has events written to the ring at this address from now on; null for no ring. A ring that was in
// use must stay where it is: a thread may be about to write to it.
void use(void* ring);

// Returns the time of CLOCK_MONOTONIC in nanoseconds, which all processes of a host share.
std::uint64_t now();

// Records an event that happens now, or did at `time`. Does nothing without a ring.
void record_at(
    std::uint64_t time, Kind kind, std::uint32_t owner, std::uint64_t a, std::uint64_t b);
void record(Kind kind, std::uint32_t owner = 0, std::uint64_t a = 0, std::uint64_t b = 0);

}  // namespace fastddp::events
