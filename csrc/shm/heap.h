// Memory that this process's peers can read and write: where tensors lie that are reduced without
// a copy.
//
// Each process has one heap for all its groups, of more address space than it will need: pages cost
// nothing before they are touched, and go back to the system when a block is freed. So a peer maps
// it once, an address is an offset, and there is nothing to look up, to grow or to announce later.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "shm/segment.h"

namespace fastddp::shm {

class Heap {
 public:
  // This process's; made when first asked for, also anew after a fork. Never destroyed: tensors in
  // it may be freed at any time, also while the process ends. Throws Error.
  static Heap& mine();

  // Returns zeroed memory, aligned to a page. Throws Error that names the size.
  void* allocate(std::size_t bytes);

  // Gives back what allocate() returned. Does nothing in a process that was forked since.
  void free(void* block);

  // From now on freed blocks are not used again. After a collective that failed half way, a peer
  // may still write to one.
  void retire_freed_blocks() { retires_ = true; }

  bool contains(const void* begin, std::size_t bytes) const;
  std::size_t used() const;

  char* data() const { return segment_.data(); }
  Address address() const { return segment_.address(); }

 private:
  Heap();

  const pid_t pid_;
  Segment segment_;
  std::atomic<bool> retires_ = false;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  // bytes by offset; neighbours are merged
  std::map<std::size_t, std::size_t> used_;
};

// A peer's heap, mapped once however many groups share it. Throws Error.
std::shared_ptr<const Segment> open_peer_heap(const Address& address);

}  // namespace fastddp::shm
