#include "shm/collectives.h"

namespace fastddp::shm {

void Collectives::barrier(Deadline deadline) {
  group_.begin({.kind = Kind::kBarrier}, deadline);
  group_.await_all(group_.advance());
}

}  // namespace fastddp::shm
