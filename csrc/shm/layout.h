// The segment that the ranks of a group on one host share: every byte of it.
//
//   Header | RankBlock x ranks | staging: kSlots slots of kSlotBytes x ranks
//   | a MessageLog for each end x ranks x ranks
//
// A rank writes to its own block, slots and logs only, but for the verdict, which whoever finds a
// fault writes, and `sleepers` of a clock.
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
  kRefused,  // with arguments for which its rank raised an error
  kUnknown,
};

// The kind may have come from another rank, and be none of these. In names.cpp.
const char* name_of(Kind kind);

// What crosses hosts goes in pieces of so many bytes, so that one is on the wire while the next is
// reduced here.
constexpr std::size_t kPieceBytes = std::size_t{2} << 20;

// Three: one is filled, one is on the wire and one is read.
constexpr std::size_t kStagedPieces = 3;

// The type that users know, where it travels as elements of another one; at most 16 characters.
using TypeName = std::array<char, 16>;

// What a rank is about to do. All from `kind` to `numel`, `elsewhere` and `label` have to be the
// same on all ranks.
struct Call {
  Kind kind = Kind::kBarrier;
  Element element = Element::kUInt8;
  TypeName type{};
  Reduction reduction = Reduction::kSum;
  std::uint32_t root = 0;              // by the group's numbering
  std::uint64_t numel = 0;             // per rank
  std::uint64_t operand = kElsewhere;  // where it lies in the rank's heap
  bool staged = false;                 // there, piece after piece, rather than as a whole
  bool across = false;                 // it crosses hosts, from the heap; a rank's own knowledge
  bool elsewhere = false;              // another transport carries it out; here it is announced
  std::uint64_t label = 0;             // whose it is; Group::begin() fills it in

  static constexpr std::uint64_t kElsewhere = ~std::uint64_t{0};

  // Of its operand in the heap; the rest of what the ranks agree on is taken as given.
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

// A call as others see it: readable at any time, also while it is being replaced.
class PublishedCall {
 public:
  void write(Time number, const Call& call);

  // Returns whether `call` is now the one of that number. False if there is a newer one.
  bool read(Time number, Call& call) const;

 private:
  std::atomic<std::uint64_t> number_{0};  // doubled, and one more while the call is being written
  std::atomic<std::uint64_t> what_{0};
  std::atomic<std::uint64_t> numel_{0};
  std::atomic<std::uint64_t> operand_{0};
  std::atomic<std::uint64_t> label_{0};
  std::array<std::atomic<std::uint64_t>, sizeof(TypeName) / sizeof(std::uint64_t)> type_{};
};

// How many calls a rank may be ahead, before the oldest can no longer be compared.
constexpr std::size_t kCallsKept = 16;

enum class State : std::uint32_t { kHere, kLeft };

struct RankBlock {
  Clock clock;
  std::atomic<State> state{State::kHere};
  std::atomic<Time> agreed{0};  // the end of the first step of the last call it found all agree on
  std::array<PublishedCall, kCallsKept> calls;
};

// Why the group is broken; written once, by the first who finds out.
struct Verdict {
  enum class Is : std::uint32_t { kNone, kBeingWritten, kWritten };
  static constexpr std::size_t kTextBytes = 2048;

  std::atomic<Is> is{Is::kNone};
  std::array<char, kTextBytes> text{};
};

// The two ends of a message.
enum class End : std::uint8_t { kSender, kReceiver };

// How many messages one end may be ahead, before the oldest can no longer be compared.
constexpr std::size_t kMessagesKept = 16;

// What a rank has said of its latest messages with another one. Zeroed memory is an empty log.
struct MessageLog {
  struct Entry {
    std::atomic<std::uint64_t> message{0};  // its tag and its number under that; 0 is none
    std::atomic<std::uint64_t> bytes{0};
  };
  std::array<Entry, kMessagesKept> entries;
};

constexpr std::uint32_t kLayoutVersion = 4;

struct Header {
  Nonce nonce;
  std::uint32_t version = kLayoutVersion;
  std::uint32_t ranks = 0;
  Verdict verdict;
};

// How many chunks after it was filled a slot is read: the ranks may be so far apart.
constexpr std::size_t kLag = 1;

// A slot is free again once all have ended the step after the one in which it was read. Small
// enough for all of them to stay in a core's second-level cache.
constexpr std::size_t kSlots = kLag + 3;
constexpr std::size_t kSlotBytes = std::size_t{128} << 10;

// The segment's parts, by address.
class Layout {
 public:
  Layout(char* base, std::size_t ranks) : base_(base), ranks_(ranks) {}

  static std::size_t bytes(std::size_t ranks) {
    return messages_begin(ranks) + 2 * ranks * ranks * sizeof(MessageLog);
  }

  // Makes the objects in a segment's zeroed memory, but for the nonce that is there.
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
