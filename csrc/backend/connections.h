// The other backends that stand behind a group: one that connects all of its ranks, and where the
// group spans hosts one more.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <chrono>
#include <cstdint>
#include <vector>

namespace fastddp {

// Where a group spans hosts: how parts of an all-reduce cross.
struct Lanes {
  std::int64_t count = 0;                     // ranks per host that exchange parts
  std::vector<int> ranks;                     // those with this one's place; empty if it has none
  c10::intrusive_ptr<c10d::Backend> backend;  // theirs; null if it has none
};

class Connections {
 public:
  // `inner` connects all ranks of the group.
  Connections(int rank, int size, c10::intrusive_ptr<c10d::Backend> inner);

  // For a group that spans hosts; before the first collective.
  void set_lanes(Lanes lanes);

  const c10::intrusive_ptr<c10d::Backend>& inner() const { return inner_; }
  const Lanes& lanes() const { return lanes_; }

  // The inner backend's, which whoever else has its options may change.
  std::chrono::milliseconds timeout() const;

  // Ends what other ranks wait for in the inner backend.
  void close();

  // Gives away what connects this rank's lane, so that it can be closed; null if there is none.
  c10::intrusive_ptr<c10d::Backend> take_lane();

  // Drops both backends, and waits for the threads of their sockets.
  void drop();

  // Forgets both backends without ending them: in a forked child they are the parent's.
  void leak();

 private:
  const int rank_;
  const int size_;
  c10::intrusive_ptr<c10d::Backend> inner_;
  Lanes lanes_;
};

}  // namespace fastddp
