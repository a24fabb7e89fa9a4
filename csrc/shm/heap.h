// Memory that this process's peers can read and write: where tensors lie that are reduced without
// a copy.
//
// Each process has one heap for all its groups, of more address space than it will need: pages cost
// nothing before they are touched, and go back to the system when a block is freed. So a peer maps
// it once, an address is an offset, and there is nothing to look up, to grow or to announce later.
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
  // This process's; made when first asked for, also anew after a fork. Never destroyed: tensors in
  // it may be freed at any time, also while the process ends. Throws Error.
  static Heap& mine();

  // Returns zeroed memory, aligned to a page. Throws NoRoom that names the size.
  void* allocate(std::size_t bytes);

  // Gives back what allocate() returned. Does nothing in a process that was forked since.
  void free(void* block);

  // The block that holds `offset` is not used again once it is freed: after a collective that
  // failed half way, a peer may still write to it.
  void retire(std::uint64_t offset);

  bool contains(const void* begin, std::size_t bytes) const;
  std::size_t used() const;

  // While one lives, the pages of blocks that are freed stay for the blocks that are allocated
  // next, in this process and in its peers: for buckets that make way for others of the same
  // gradients. A page that was given back costs as much as ten that are zeroed.
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
  std::map<std::size_t, std::size_t> free_;  // bytes by offset; neighbours are merged
  std::map<std::size_t, std::size_t> used_;
  std::set<std::size_t> retired_;            // of those in use
  std::map<std::size_t, std::size_t> kept_;  // free, with pages: ends by offset
  int num_keeping_ = 0;
};

// A peer's heap, mapped once however many groups share it. Throws Error.
std::shared_ptr<const Segment> open_peer_heap(const Address& address);

}  // namespace fastddp::shm
