#include "shm/heap.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>

#include "shm/error.h"

namespace fastddp::shm {
namespace {

constexpr std::size_t kLeastBytes = std::size_t{256} << 20;

// 4 KiB on x86; 16 or 64 KiB on some aarch64.
std::size_t page() {
  static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

// The limit on machines with much memory: many ranks map each other's heaps, and a process has
// 128 TiB of address space for all of them.
constexpr std::size_t kMostBytes = std::size_t{1} << 40;

// Address space for twice the machine's memory, so that even a fragmented heap has more of it than
// there is memory to fill it with.
std::size_t wanted_bytes() {
  const auto pages = static_cast<std::size_t>(std::max(1L, ::sysconf(_SC_PHYS_PAGES)));
  return std::clamp(std::bit_ceil(2 * pages * page()), kLeastBytes, kMostBytes);
}

Segment reserve() {
  for (std::size_t bytes = wanted_bytes();; bytes /= 2) {
    try {
      return Segment::create("fastddp-heap", bytes);
    } catch (const Error&) {  // `ulimit -v` and the like
      if (bytes <= kLeastBytes) throw;
    }
  }
}

std::size_t round_up(std::size_t bytes) {
  return std::max(page(), (bytes + page() - 1) / page() * page());
}

}  // namespace

Heap::Heap() : pid_(::getpid()), segment_(reserve()) {
  free_[page()] = segment_.size() - page();  // the first page holds the nonce
}

Heap& Heap::mine() {
  // Takes no lock once the heap is made: every collective asks for it, and a lock that another
  // thread holds during a fork stays locked in the child.
  static std::mutex mutex;
  static std::atomic<Heap*> heap{nullptr};
  const pid_t me = ::getpid();
  Heap* made = heap.load(std::memory_order_acquire);
  if (made != nullptr && made->pid_ == me) return *made;
  const std::lock_guard lock(mutex);
  made = heap.load(std::memory_order_relaxed);
  if (made == nullptr || made->pid_ != me) {
    made = new Heap;
    heap.store(made, std::memory_order_release);
  }
  return *made;
}

void* Heap::allocate(std::size_t bytes) {
  // Clamped, because rounding up could overflow; the heap has no more than this anyway.
  const std::size_t rounded = round_up(std::min(bytes, segment_.size()));
  std::size_t offset = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto hole = std::find_if(free_.begin(), free_.end(),
                                   [&](const auto& entry) { return entry.second >= rounded; });
    if (hole == free_.end())
      throw NoRoom("the shared heap of " + std::to_string(segment_.size()) +
                   " bytes has no room for " + std::to_string(bytes) + " more");
    offset = hole->first;
    const std::size_t rest = hole->second - rounded;
    free_.erase(hole);
    if (rest > 0) free_[offset + rounded] = rest;
    used_[offset] = rounded;
    zero_kept(offset, offset + rounded);
  }
  char* block = data() + offset;
#ifdef MADV_POPULATE_WRITE
  // Fails where there is no memory left; touching the pages would end the process instead.
  const auto has_pages = [&] {
    return ::madvise(block, rounded, MADV_POPULATE_WRITE) == 0 || errno == EINVAL;
  };
  if (!has_pages() && (!discard_kept() || !has_pages())) {
    const std::string reason = std::strerror(errno);
    free(block);
    throw NoRoom("taking " + std::to_string(bytes) + " bytes of shared memory: " + reason);
  }
#endif
  return block;
}

void Heap::free(void* block) {
  if (pid_ != ::getpid()) return;
  const auto offset = static_cast<std::size_t>(static_cast<char*>(block) - data());
  const std::lock_guard lock(mutex_);
  const auto entry = used_.find(offset);
  if (entry == used_.end()) return;
  std::size_t begin = entry->first;
  std::size_t bytes = entry->second;
  used_.erase(entry);
  const bool is_retired = retired_.erase(begin) > 0;
  if (num_keeping_ > 0 && !is_retired) {
    kept_[begin] = begin + bytes;
  } else {
    segment_.discard(begin, bytes);
  }
  if (is_retired) return;
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && begin + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == begin) {
      begin = previous->first;
      bytes += previous->second;
    }
  }
  free_[begin] = bytes;
}

// Zeroes the kept pages of a block, as allocate() promises.
void Heap::zero_kept(std::size_t begin, std::size_t end) {
  auto part = kept_.upper_bound(begin);
  if (part != kept_.begin()) --part;
  while (part != kept_.end() && part->first < end) {
    const auto [first, last] = *part;
    if (last <= begin) {
      ++part;
      continue;
    }
    part = kept_.erase(part);
    std::memset(data() + std::max(first, begin), 0, std::min(last, end) - std::max(first, begin));
    if (first < begin) kept_[first] = begin;
    if (last > end) kept_[end] = last;
  }
}

Heap::KeepsPages::KeepsPages(Heap& heap) : heap_(heap) {
  const std::lock_guard lock(heap.mutex_);
  ++heap.num_keeping_;
}

Heap::KeepsPages::~KeepsPages() {
  {
    const std::lock_guard lock(heap_.mutex_);
    if (--heap_.num_keeping_ > 0) return;
  }
  heap_.discard_kept();
}

// Returns whether there were kept pages.
bool Heap::discard_kept() {
  const std::lock_guard lock(mutex_);
  const bool any = !kept_.empty();
  for (const auto& [begin, end] : kept_) segment_.discard(begin, end - begin);
  kept_.clear();
  return any;
}

void Heap::retire(std::uint64_t offset) {
  const std::lock_guard lock(mutex_);
  auto block = used_.upper_bound(offset);
  if (block == used_.begin()) return;
  --block;
  if (offset - block->first < block->second) retired_.insert(block->first);
}

bool Heap::contains(const void* begin, std::size_t bytes) const {
  const auto* first = static_cast<const char*>(begin);
  return first >= data() && first <= data() + size() &&
         bytes <= size() - static_cast<std::size_t>(first - data());
}

std::size_t Heap::used() const {
  const std::lock_guard lock(mutex_);
  std::size_t sum = 0;
  for (const auto& [offset, bytes] : used_) sum += bytes;
  return sum;
}

std::shared_ptr<const Segment> open_peer_heap(const Address& address) {
  struct Entry {
    Nonce nonce;
    std::weak_ptr<const Segment> segment;
  };
  static std::mutex mutex;
  static auto& opened = *new std::map<pid_t, Entry>;
  const std::lock_guard lock(mutex);
  Entry& entry = opened[address.pid];
  if (entry.nonce == address.nonce) {
    if (auto segment = entry.segment.lock()) return segment;
  }
  auto segment = std::make_shared<const Segment>(Segment::open(address));
  entry = {address.nonce, segment};
  return segment;
}

}  // namespace fastddp::shm
