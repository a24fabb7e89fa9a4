// What can be known of another process on this host: whether it lives, is stopped, how it ended.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "shm/segment.h"

namespace fastddp::shm {

class Process {
 public:
  // Throws Error if there is no such process.
  explicit Process(pid_t pid);

  bool ended() const;

  // By a signal, as far as that can still be known.
  bool was_killed() const;

  // "was killed by signal 9 (Killed)", "exited with status 1", "is stopped", ... For messages.
  std::string describe() const;

 private:
  pid_t pid_;
  Fd pidfd_;  // the number may be another process's by now, this is not
};

// The process that has a heap, opened once however many groups it is in: one descriptor for each
// would be many. Throws Error if there is no such process.
std::shared_ptr<const Process> process_of(const Address& heap);

}  // namespace fastddp::shm
