// Keeps the memory of torch's large CPU tensors mapped between training steps.
#pragma once

#include <cstddef>

namespace fastddp {

inline constexpr double kPatienceSeconds = 30;

// The least size of a large tensor. From this size on, malloc may return a block to the kernel when
// it is freed: it is the initial M_MMAP_THRESHOLD of glibc.
inline constexpr std::size_t kLargeBytes = 128 * 1024;

// Turns the cache on or off: when it is on, CPU tensors of kLargeBytes or more are allocated
// through one BlockCache in this process, otherwise by torch's default allocator. Blocks of either
// stay valid and go back to where they came from. A block that nobody asks for during `patience_s`
// seconds goes back to the system when the next large CPU tensor is allocated, or one of the next
// small ones. Returns whether the cache is in use now: it never replaces another library's
// allocator.
bool keep_memory(bool on, double patience_s = kPatienceSeconds);

// Gives the idle blocks back to the system. Returns the number of bytes. May be called from any
// thread.
std::size_t release_memory();

// Bytes in the cache, zero until it is first used.
struct KeptMemory {
  std::size_t in_use = 0;
  std::size_t idle = 0;
  std::size_t peak = 0;  // the most that was recently in use at once
};
KeptMemory kept_memory();

}  // namespace fastddp
