// What can be known about another process on this host: whether it runs or is stopped, and how it
// ended.
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

  // Whether a signal ended the process, as far as that can still be known.
  bool was_killed() const;

  // Returns text for messages, such as "was killed by signal 9 (Killed)", "exited with status 1" or
  // "is stopped".
  std::string describe() const;

 private:
  pid_t pid_;
  Fd pidfd_;  // the pid may be that of another process by now; this descriptor is not
};

// Returns the process that owns a heap. It is opened once for all groups that it is in, because a
// descriptor for each group would be too many. Throws Error if there is no such process.
std::shared_ptr<const Process> process_of(const Address& heap);

}  // namespace fastddp::shm
