#include "shm/collectives.h"

namespace fastddp::shm {

void Collectives::barrier(Deadline deadline) {
  group_.begin({.kind = Kind::kBarrier}, deadline);
  const Ending ending(group_);
  group_.await_all(group_.advance());
}

}  // namespace fastddp::shm
