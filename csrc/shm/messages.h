// Checks messages between two ranks of this host that another transport carries: both ends have to
// mean the same size.
//
// Either end may come first, and neither waits for the other: each writes down what it is about to
// do and then reads what the other has written. Both accesses are sequentially consistent, so the
// end that comes second finds the first one, before it hands its message to the transport. Both
// ends count the messages of a tag, which the transport delivers in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

#include "shm/layout.h"

namespace fastddp::shm {

// The ends of one rank. For one thread at a time.
class Messages {
 public:
  // `me` is the index of this rank among the `ranks` of this host. The memory of `layout` has to
  // outlive this object.
  Messages(Layout layout, std::size_t ranks, std::size_t me)
      : layout_(layout), ranks_(ranks), me_(me) {}

  // Announces this rank's end of the next message of a tag with `peer`. Returns the number of bytes
  // that the other end has announced, or nothing if it has not yet or if that cannot be known.
  std::optional<std::uint64_t> announce(End end,
                                        std::size_t peer,
                                        std::uint32_t tag,
                                        std::uint64_t bytes);

  // Takes back the last announcement, for a message that does not happen.
  void withdraw();

  // Says that this rank receives messages of this tag from any rank. From then on nobody knows
  // which messages it gets, so messages that it receives with this tag are not compared.
  void take_from_anybody(std::uint32_t tag);

 private:
  using Stream = std::tuple<End, std::size_t, std::uint32_t>;  // end, peer, tag
  using Count = std::optional<std::uint32_t>;                  // nothing: no longer known

  Count* count_of(const Stream& stream);

  const Layout layout_;
  const std::size_t ranks_;
  const std::size_t me_;
  std::map<Stream, Count> counts_;
  std::map<std::pair<End, std::size_t>, std::size_t> written_;
  // These belong to the last announcement; null if it was not counted.
  Count* last_count_ = nullptr;
  MessageLog::Entry* last_ = nullptr;
};

// How many streams are counted; messages of further streams are not compared.
constexpr std::size_t kStreamsKept = 4096;

}  // namespace fastddp::shm
