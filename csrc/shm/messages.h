// Messages between two ranks of this host that another transport carries: whether both ends mean
// the same size.
//
// Either end may come first, and it waits for nobody: it leaves what it is about to do, and looks
// what the other has left. Both are sequentially consistent, so whoever comes second finds the
// first, before it has handed its end to the transport. Both count their messages under a tag; the
// transport delivers those in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

#include "shm/layout.h"

namespace fastddp::shm {

// One rank's ends; for one thread at a time.
class Messages {
 public:
  // What lies behind `layout` has to outlive this. `me` is this rank's place among `ranks`.
  Messages(Layout layout, std::size_t ranks, std::size_t me)
      : layout_(layout), ranks_(ranks), me_(me) {}

  // Announces this rank's end of its next message with `peer` under a tag. Returns how many bytes
  // the other end has announced; nothing if it has not yet, or is not to be known.
  std::optional<std::uint64_t> announce(End end,
                                        std::size_t peer,
                                        std::uint32_t tag,
                                        std::uint64_t bytes);

  // Takes back what was announced last: it does not happen.
  void withdraw();

  // This rank takes from anybody under this tag: from then on it is not known which messages it
  // gets, and they are not compared.
  void take_from_anybody(std::uint32_t tag);

 private:
  using Stream = std::tuple<End, std::size_t, std::uint32_t>;  // end, peer, tag
  using Count = std::optional<std::uint32_t>;                  // nothing: not known any more

  Count* count_of(const Stream& stream);

  const Layout layout_;
  const std::size_t ranks_;
  const std::size_t me_;
  std::map<Stream, Count> counts_;
  std::map<std::pair<End, std::size_t>, std::size_t> written_;
  // Of what was announced last; null if it was not counted.
  Count* last_count_ = nullptr;
  MessageLog::Entry* last_ = nullptr;
};

// How many streams are counted; messages in further ones are not compared.
constexpr std::size_t kStreamsKept = 4096;

}  // namespace fastddp::shm
