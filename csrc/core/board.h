// What this process does just now, in memory that other processes can read: also while this one is
// stuck in C code with the GIL, stopped, or dead.
//
// The memory is made by `fastddp/watch/board.py`, which has the same layout; so has the reader. It
// consists of words of 64 bits, because Python can store one at a time. Every word has one writer
// at a time. A wait is several words that belong together, so its first word is a sequence lock: it
// is odd while the wait is being written (csrc/shm/layout.cpp does the same for a call).
//
// Writing takes no lock and no system call. Nothing is written for a wait that is over within the
// first look-around, so a healthy step writes what its model has come to, and nothing else.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/phase.h"

namespace fastddp {

namespace board {

// The words at the beginning; `fastddp/watch/layout.py` says what each is. C++ writes only the
// words kEnding, kIssuer and kHandOvers.
enum Header : std::size_t {
  kMagic,
  kPid,
  kBorn,
  kRank,
  kSeen,
  kStackSignal,
  kStackFile,
  kMainThread,
  kEnding,
  kIssuer,            // the kernel's number of the thread that began the latest collective
  kHandOvers,         // how often another thread began one than did before
  kHeaderWords = 32,  // those between are written by Python alone
};

// Of one model: what its reducer has come to.
enum Model : std::size_t {
  kOwner,      // 0 for a place that is not taken
  kGroup,      // of the reducer's group, see id_of()
  kPhase,      // core/phase.h
  kSteps,      // rounds that have ended
  kLastParam,  // the index of the parameter that got a gradient last, plus 1; 0 for none
  kLaunched,   // collectives that the round under way has launched
  kChanged,    // when the phase changed, in nanoseconds of CLOCK_MONOTONIC
  kModelWords = 8,
};

// Of one wait.
enum Wait : std::size_t {
  kSequence,
  kSince,      // when it began, in nanoseconds of CLOCK_MONOTONIC; 0 for a place that is not taken
  kWaitGroup,  // see id_of(); 0 for no group
  kNumber,     // of the collective in its group; 0 where it is not known
  kLabel,      // shm/label.h
  kThread,     // the kernel's number of the thread that waits
  kSource,     // Source
  kMissing,    // bit i: rank i of the group has not called it, as far as is known; 64 ranks at most
  kUnfinished,  // bit i: rank i of the group has called it and has not done its part yet
  kWaitWords = 16,
};

constexpr std::uint64_t kMagicNumber = 0x31304444'54534146;  // "FASTDD01"
constexpr std::size_t kModels = 16;
constexpr std::size_t kNativeModels = 8;  // of these, the first ones are written by C++
constexpr std::size_t kWaits = 32;
constexpr std::size_t kNativeWaits = 16;  // of these, the first ones are written by C++
constexpr std::size_t kTextBytes = 384;   // UTF-8, ended by a zero

constexpr std::size_t kModelsAt = kHeaderWords;
constexpr std::size_t kWaitsAt = kModelsAt + kModels * kModelWords;
constexpr std::size_t kWaitStride = kWaitWords + kTextBytes / sizeof(std::uint64_t);
constexpr std::size_t kWords = kWaitsAt + kWaits * kWaitStride;

// Who writes a wait, and so what its members are.
enum class Source : std::uint64_t {
  kShm = 1,    // a collective in shared memory
  kBackward,   // a reducer's collective on another transport
  kNamed,      // a wait that `fastddp/comm/waiting.py` names
  kOwnThread,  // a collective that another thread of this process carries out
  kScript,     // a collective of the script's own, as the watcher finds it in the stack
};

// Returns a number for a group's name, the same in every process and both languages: 64-bit FNV-1a
// (G. Fowler, L. Noll, K.-P. Vo, "The FNV Non-Cryptographic Hash Algorithm"). Never 0.
constexpr std::uint64_t id_of(const char* text, std::size_t size) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (std::size_t i = 0; i < size; ++i)
    hash = (hash ^ static_cast<unsigned char>(text[i])) * 0x100000001b3;
  return hash == 0 ? 1 : hash;
}
inline std::uint64_t id_of(const std::string& text) { return id_of(text.data(), text.size()); }

// Has this process write to the board at `words` from now on; nullptr for none. Only the threads of
// this process write to it, and the memory stays for the life of the process: another thread may be
// in the middle of a write. A forked child has to call this with its own board, or nullptr.
void use(void* words);

// Notes that this thread begins a collective. A process with one such thread can be told to be
// stuck for certain: none of its other threads would have joined what the others wait for.
void note_issuer();

// Notes that a signal handler of the script has ended a wait.
void note_interrupt();

// A model's place on the board, from when its reducer is made until it is freed.
class ModelPlace {
 public:
  // `group` as for kGroup.
  ModelPlace(std::uint32_t owner, std::uint64_t group);
  ~ModelPlace();
  ModelPlace(const ModelPlace&) = delete;
  ModelPlace& operator=(const ModelPlace&) = delete;

  void set_phase(Phase phase, std::uint64_t steps);
  void set_launched(std::uint64_t launched) { put(kLaunched, launched); }
  void set_last_param(std::size_t index) { put(kLastParam, index + 1); }

 private:
  void put(Model word, std::uint64_t value);

  const std::uint64_t owner_;
  const std::uint64_t group_;
  const std::size_t place_;  // kNativeModels if all places are taken: then nothing is written
};

// A wait's place on the board.
class WaitPlace {
 public:
  WaitPlace();
  ~WaitPlace();
  WaitPlace(const WaitPlace&) = delete;
  WaitPlace& operator=(const WaitPlace&) = delete;

  // kNativeWaits if all places are taken: then nothing is written.
  std::size_t index() const { return place_; }
  // Writes the words from kSince on, and the text, cut to fit.
  void write(const std::array<std::uint64_t, kWaitWords>& words, const std::string& text);

 private:
  const std::size_t place_;
};

}  // namespace board
}  // namespace fastddp
