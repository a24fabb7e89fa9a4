// How ranks compare a collective that another transport carries out.
#include <algorithm>

#include "shm/collectives/chunks.h"

namespace fastddp::shm {

void Collectives::announce(Kind kind, int root, Deadline deadline) {
  begin_elsewhere(kind, root, deadline);
  group_.advance();
  group_.compare_so_far();
}

void Collectives::begin_elsewhere(Kind kind, int root, Deadline deadline) {
  group_.begin({.kind = kind, .root = static_cast<std::uint32_t>(root), .elsewhere = true},
               deadline);
}

std::vector<std::string> Collectives::exchange(const std::string& mine) {
  using Length = std::uint64_t;
  constexpr std::size_t kMost = kSlotBytes - sizeof(Length);
  if (mine.size() > kMost) group_.fail("what the ranks have to compare does not fit into a slot");
  const std::size_t slot = group_.claim_slot();
  const Length length = mine.size();
  copy(group_.slot(group_.me(), slot), &length, sizeof(length));
  copy(group_.slot(group_.me(), slot) + sizeof(length), mine.data(), mine.size());
  group_.await_all(group_.advance());
  group_.check_current();
  std::vector<std::string> all;
  for (std::size_t i = 0; i < group_.size(); ++i) {
    const char* const from = group_.slot(i, slot);
    Length theirs = 0;
    copy(&theirs, from, sizeof(theirs));
    all.emplace_back(from + sizeof(theirs), std::min<std::size_t>(theirs, kMost));
  }
  return all;
}

}  // namespace fastddp::shm
