#include "torch/keep_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#ifndef _WIN32
#include <pthread.h>
#endif

#include <mutex>

#include "core/block_cache.h"

namespace fastddp {
namespace {

struct Shared {
  std::mutex mutex;
  BlockCache cache{&c10::alloc_cpu, &c10::free_cpu};
};

// Never destroyed: tensors outlive every static.
Shared& shared() {
  static Shared* const instance = [] {
    static Shared* const made = new Shared;
#ifndef _WIN32
    // A child has one thread only; were another one to hold the mutex at the fork, the child's
    // first large tensor would wait for ever. (test_keep_memory.py)
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
    if (shared().cache.release(data)) return;
  }
  c10::free_cpu(data);
}

// Torch's default allocator, with the cache in front of large blocks. As there, the data pointer is
// the deleter's context too, which raw_allocate() relies on.
class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes < kLargeBytes) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* data = nullptr;
    try {
      const std::lock_guard lock(shared().mutex);
      data = shared().cache.allocate(bytes);
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

bool keep_memory(bool on) {
  static KeepingAllocator* const keeping = new KeepingAllocator;  // tensors keep a pointer to it
  c10::Allocator* const usual = c10::GetDefaultCPUAllocator();
  c10::Allocator* const current = c10::GetCPUAllocator();
  if (current == (on ? usual : keeping)) c10::SetCPUAllocator(on ? keeping : usual);
  return c10::GetCPUAllocator() == keeping;
}

KeptMemory kept_memory() {
  const std::lock_guard lock(shared().mutex);
  const BlockCache& cache = shared().cache;
  return {cache.in_use(), cache.idle(), cache.peak()};
}

}  // namespace fastddp
