#include "tensor/keep_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <chrono>
#include <cstdint>
#include <mutex>

#include "core/block_cache.h"

namespace fastddp {
namespace {

using Clock = BlockCache::Clock;

// Gives a block's pages to the system and not only to malloc: once it has freed blocks of up to
// 32 MiB, glibc keeps such blocks inside its heap.
void give_back(void* block, [[maybe_unused]] std::size_t bytes) {
#ifdef __linux__
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(block);
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
  c10::free_cpu(block);
}

Clock::duration seconds(double count) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

struct Shared {
  std::mutex mutex;
  BlockCache cache{&c10::alloc_cpu, &give_back, seconds(kPatienceSeconds)};
};

// Never destroyed, because tensors outlive every static object.
Shared& shared() {
  static Shared* const instance = [] {
    static Shared* const made = new Shared;
#ifndef _WIN32
    // A forked child has only the thread that forked. If another thread held the mutex at the fork,
    // the child's first large tensor would wait forever. (test_keep_memory.py)
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] { made->mutex.unlock(); });
#endif
    return made;
  }();
  return *instance;
}

void release(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  {
    const std::lock_guard lock(shared().mutex);
    if (shared().cache.release(data, Clock::now())) return;
  }
  c10::free_cpu(data);
}

// A job that goes on with small tensors only would never call the cache, and idle blocks would
// stay. So one in kEvery small allocations calls it, which is rare enough to cost nothing.
void decay_at_times() {
  constexpr unsigned kEvery = 256;
  static thread_local unsigned calls = 0;
  if (++calls % kEvery != 0) return;
  const std::lock_guard lock(shared().mutex);
  shared().cache.decay(Clock::now());
}

// Torch's default allocator, with the cache in front of it for large blocks. As in that allocator,
// the data pointer is also the deleter's context, which raw_allocate() relies on.
class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes < kLargeBytes) {
      decay_at_times();
      return c10::GetDefaultCPUAllocator()->allocate(bytes);
    }
    void* data = nullptr;
    try {
      const std::lock_guard lock(shared().mutex);
      data = shared().cache.allocate(bytes, Clock::now());
    } catch (...) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      throw;
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

bool keep_memory(bool on, double patience_s) {
  {
    const std::lock_guard lock(shared().mutex);
    shared().cache.set_patience(seconds(patience_s));
  }
  static KeepingAllocator* const keeping = new KeepingAllocator;  // tensors keep a pointer to it
  c10::Allocator* const usual = c10::GetDefaultCPUAllocator();
  c10::Allocator* const current = c10::GetCPUAllocator();
  if (current == (on ? usual : keeping)) c10::SetCPUAllocator(on ? keeping : usual);
  return c10::GetCPUAllocator() == keeping;
}

std::size_t release_memory() {
  const std::lock_guard lock(shared().mutex);
  return shared().cache.trim();
}

KeptMemory kept_memory() {
  const std::lock_guard lock(shared().mutex);
  const BlockCache& cache = shared().cache;
  return {cache.in_use(), cache.idle(), cache.peak()};
}

}  // namespace fastddp
