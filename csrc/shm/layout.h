// The segment that the ranks of a group on one host share: every byte of it.
//
//   Header | RankBlock x ranks | staging: kSlots slots of kSlotBytes x ranks
//   | a MessageLog for each end x ranks x ranks
//
// A rank writes only to its own block, slots and logs, with two exceptions: the rank that finds a
// fault writes the verdict, and a rank that sleeps adds itself to the sleepers of another's clock.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kernels/reduce.h"
#include "shm/clock.h"
#include "shm/segment.h"

namespace fastddp::shm {

enum class Kind : std::uint8_t {
  kBarrier,
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kReduce,
  kGather,
  kScatter,
  kAllToAll,
  kMonitoredBarrier,
  kRefused,  // its arguments were wrong, so its rank raised an error
  kUnknown,
};

// Also for a value that another rank has sent and that is none of the above. Defined in names.cpp.
const char* name_of(Kind kind);

// The size of the pieces in which operands cross hosts, so that one piece is on the wire while the
// next is reduced here.
constexpr std::size_t kPieceBytes = std::size_t{2} << 20;

// Three pieces: one is filled, one is on the wire and one is read.
constexpr std::size_t kStagedPieces = 3;

// The name of the type that users know, for tensors that travel as elements of another type; at
// most 16 characters.
using TypeName = std::array<char, 16>;

// The collective that a rank is about to do. The members from `kind` to `numel`, `elsewhere` and
// `label` have to be the same on all ranks.
struct Call {
  Kind kind = Kind::kBarrier;
  Element element = Element::kUInt8;
  TypeName type{};
  Reduction reduction = Reduction::kSum;
  std::uint32_t root = 0;              // index in the group that users know
  std::uint64_t numel = 0;             // per rank
  std::uint64_t operand = kElsewhere;  // offset of the operand in the rank's heap
  bool staged = false;                 // lies in the heap piece after piece, not as a whole
  bool across = false;                 // crosses hosts, from the heap; not published
  bool elsewhere = false;              // carried out by another transport, and only announced here
  // Group::begin() fills these in:
  std::uint64_t label = 0;  // the owner, see label.h
  std::uint64_t began = 0;  // nanoseconds of CLOCK_MONOTONIC; 0 where that is not known

  static constexpr std::uint64_t kElsewhere = ~std::uint64_t{0};

  // Returns the size of the operand in the heap, from members that the ranks have compared.
  std::uint64_t operand_bytes(std::size_t ranks) const {
    if (staged) return kStagedPieces * kPieceBytes;
    return numel * size_of(element) * (kind == Kind::kReduceScatter ? ranks : 1);
  }

  bool agrees_with(const Call& them) const {
    return kind == them.kind && element == them.element && type == them.type &&
           reduction == them.reduction && root == them.root && numel == them.numel &&
           label == them.label && elsewhere == them.elsewhere;
  }
};

// A call as other ranks see it: readable at any time, also while it is being replaced. This is a
// sequence lock with one writer; layout.cpp has the order of its accesses.
class PublishedCall {
 public:
  void write(Time number, const Call& call);

  // Reads the call of that number. Returns false if a newer call has replaced it, or if that call
  // is not published yet; `call` then holds nothing of use.
  bool read(Time number, Call& call) const;

 private:
  std::atomic<std::uint64_t> number_{0};  // twice the number, plus 1 while the call is written
  std::atomic<std::uint64_t> what_{0};
  std::atomic<std::uint64_t> numel_{0};
  std::atomic<std::uint64_t> operand_{0};
  std::atomic<std::uint64_t> label_{0};
  std::atomic<std::uint64_t> began_{0};
  std::array<std::atomic<std::uint64_t>, sizeof(TypeName) / sizeof(std::uint64_t)> type_{};
};

// How many calls a rank may be ahead before its oldest call can no longer be compared.
constexpr std::size_t kCallsKept = 16;

enum class State : std::uint32_t { kHere, kLeft };

struct RankBlock {
  Clock clock;
  std::atomic<State> state{State::kHere};
  std::atomic<Time> agreed{0};  // end of the first step of the last call found to be the same
  std::array<PublishedCall, kCallsKept> calls;
};

// Why the group is broken. Written once, by the first rank that finds a fault.
struct Verdict {
  enum class Is : std::uint32_t { kNone, kBeingWritten, kWritten };
  static constexpr std::size_t kTextBytes = 2048;

  std::atomic<Is> is{Is::kNone};
  std::array<char, kTextBytes> text{};
};

// The two ends of a message.
enum class End : std::uint8_t { kSender, kReceiver };

// How many messages one end may be ahead before its oldest message can no longer be compared.
constexpr std::size_t kMessagesKept = 16;

// The latest messages that a rank has announced to one other rank. Zeroed memory is an empty log.
struct MessageLog {
  struct Entry {
    std::atomic<std::uint64_t> message{0};  // tag and number of the message; 0 if there is none
    std::atomic<std::uint64_t> bytes{0};
  };
  std::array<Entry, kMessagesKept> entries;
};

constexpr std::uint32_t kLayoutVersion = 5;

struct Header {
  Nonce nonce;
  std::uint32_t version = kLayoutVersion;
  std::uint32_t ranks = 0;
  Verdict verdict;
};

// How many chunks after it was filled a slot is read. Ranks may be this many chunks apart without
// waiting.
constexpr std::size_t kLag = 1;

// A slot is free again once all ranks have ended the step after the one in which it was read. All
// slots together are small enough to stay in a core's second-level cache.
constexpr std::size_t kSlots = kLag + 3;
constexpr std::size_t kSlotBytes = std::size_t{128} << 10;

// Finds the parts of a segment.
class Layout {
 public:
  Layout(char* base, std::size_t ranks) : base_(base), ranks_(ranks) {}

  static std::size_t bytes(std::size_t ranks) {
    return messages_begin(ranks) + 2 * ranks * ranks * sizeof(MessageLog);
  }

  // Makes the objects in the zeroed memory of a segment, and keeps the nonce that is there.
  void construct() const;

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  RankBlock& rank(std::size_t index) const {
    return *reinterpret_cast<RankBlock*>(base_ + kPage + index * sizeof(RankBlock));
  }
  char* slot(std::size_t index, std::size_t which) const {
    return base_ + staging_begin(ranks_) + (index * kSlots + which) * kSlotBytes;
  }
  MessageLog& messages(std::size_t index, std::size_t peer, End end) const {
    const std::size_t which = 2 * (index * ranks_ + peer) + (end == End::kSender ? 0 : 1);
    return *reinterpret_cast<MessageLog*>(base_ + messages_begin(ranks_) +
                                          which * sizeof(MessageLog));
  }

 private:
  static constexpr std::size_t kPage = 4096;
  static std::size_t staging_begin(std::size_t ranks) {
    return (kPage + ranks * sizeof(RankBlock) + kPage - 1) / kPage * kPage;
  }
  static std::size_t messages_begin(std::size_t ranks) {
    return staging_begin(ranks) + ranks * kSlots * kSlotBytes;
  }

  char* base_;
  std::size_t ranks_;
};

static_assert(sizeof(Header) <= 4096);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

}  // namespace fastddp::shm
