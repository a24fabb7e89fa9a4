// Memory that the other ranks of a host can read and write. Tensors in it are reduced without a
// copy.
//
// Each process has one heap for all groups that it is in, with more address space than it will
// need: pages cost nothing before they are touched, and go back to the system when a block is
// freed. So a peer maps the heap once, an address is an offset, and nothing has to be looked up,
// grown or announced later.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "shm/segment.h"

namespace fastddp::shm {

class Heap {
 public:
  // Returns the heap of this process, which the first call makes; a forked child makes another one.
  // Never destroyed, because tensors in it may be freed at any time, also while the process ends.
  // Throws Error.
  static Heap& mine();

  // Returns zeroed memory that is aligned to a page. Throws NoRoom, with the size in its text.
  void* allocate(std::size_t bytes);

  // Takes back a block that allocate() returned. Does nothing in a process forked since then.
  void free(void* block);

  // Keeps the block that holds `offset` from being used again once it is freed: after a collective
  // that failed half way, a peer may still write to it.
  void retire(std::uint64_t offset);

  bool contains(const void* begin, std::size_t bytes) const;
  std::size_t used() const;

  // While such an object lives, freed blocks keep their pages, in this process and in the peers,
  // for the blocks that are allocated next. For buckets that are replaced by other buckets of the
  // same gradients: taking a page from the system costs as much as zeroing ten of them.
  class KeepsPages {
   public:
    explicit KeepsPages(Heap& heap);
    ~KeepsPages();
    KeepsPages(const KeepsPages&) = delete;
    KeepsPages& operator=(const KeepsPages&) = delete;

   private:
    Heap& heap_;
  };

  char* data() const { return segment_.data(); }
  std::size_t size() const { return segment_.size(); }
  Address address() const { return segment_.address(); }

 private:
  Heap();
  void zero_kept(std::size_t begin, std::size_t end);
  bool discard_kept();

  const pid_t pid_;
  Segment segment_;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  // sizes by offset; neighbours are merged
  std::map<std::size_t, std::size_t> used_;
  std::set<std::size_t> retired_;            // offsets of blocks in use
  std::map<std::size_t, std::size_t> kept_;  // free memory that still has pages: ends by offset
  int num_keeping_ = 0;
};

// Maps the heap of a peer, once for all groups that use it. Throws Error.
std::shared_ptr<const Segment> open_peer_heap(const Address& address);

}  // namespace fastddp::shm
