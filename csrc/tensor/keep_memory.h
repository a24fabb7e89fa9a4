// Gives torch's large CPU tensors memory that stays mapped between training steps.
#pragma once

#include <cstddef>

namespace fastddp {

inline constexpr double kPatienceSeconds = 30;

// From here on malloc may return a block to the kernel when it is freed: the initial
// M_MMAP_THRESHOLD of glibc.
inline constexpr std::size_t kLargeBytes = 128 * 1024;

// Has tensors on the CPU of kLargeBytes or more allocated through one BlockCache in this process,
// or by torch's default allocator again. Blocks of either remain valid and go back to where they
// came from. A block that nobody asks for during `patience_s` seconds goes back to the system, when
// the next tensor on the CPU is allocated or one of the next that are small. Returns whether the
// cache is in use now: it never takes the place of another library's allocator.
bool keep_memory(bool on, double patience_s = kPatienceSeconds);

// Gives the idle blocks back to the system; returns their bytes.
std::size_t release_memory();

// Bytes of the cache, zero until it is first used.
struct KeptMemory {
  std::size_t in_use = 0;
  std::size_t idle = 0;
  std::size_t peak = 0;  // the most that were in use at once lately
};
KeptMemory kept_memory();

}  // namespace fastddp
