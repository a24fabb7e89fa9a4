// The group of the ranks on one host, with the memory that they share.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "shm/group.h"
#include "shm/layout.h"
#include "shm/segment.h"

namespace fastddp {

// The ranks of a group on this host, once they have found each other.
struct LocalRanks {
  std::vector<int> ranks;           // of the group, ascending
  std::vector<shm::Address> heaps;  // theirs
  shm::Address control;             // the segment that they share
  std::string name;                 // of the group that users know
};

struct LocalGroup {
  // With the memory behind it, since works outlive the backend.
  std::shared_ptr<shm::Group> group;
  shm::Layout layout;

  // Makes the segment that the ranks of a host share; the lowest of them calls this.
  static shm::Segment make_control(std::size_t ranks);

  // Maps what the other ranks have announced. Throws shm::Error that says what is in the way.
  static LocalGroup open(int rank, const LocalRanks& local);
};

}  // namespace fastddp
