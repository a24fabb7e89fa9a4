// A stand-in for the toolkit's header of this name: with it the project's own .cu files compile as
// C++ and their kernels run on the CPU, where sanitizers see what they touch. Only what they use is
// here.
//
// It shows how kernels index, where their accesses go, and that their barriers match. It does not
// show what depends on blocks that run at once (here they run in turn), on streams (a launch is
// over when it returns), on the order of memory operations, or on time.
#pragma once

#include <cstddef>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__ &  // one copy for the whole grid, that nobody may write
#define __shared__ static    // of the one block that runs

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace standin {

inline constexpr std::size_t kMaxParameterBytes = 32764;
inline constexpr unsigned kMaxGrid = 0x7FFFFFFF;
inline constexpr unsigned kMaxBlock = 1024;

inline Block block;
inline cudaError_t last_error = cudaSuccess;

// Variables that tests set and read.
inline bool downwards = false;               // the order of a block's threads
inline cudaError_t fail_with = cudaSuccess;  // the next launch
inline int num_launches = 0;
inline cudaStream_t last_stream = nullptr;

}  // namespace standin

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  standin::block.barrier(where);
}

inline cudaError_t cudaGetLastError() { return std::exchange(standin::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unknown error";
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Params...),
                               Args&&... args) {
  const std::tuple<std::decay_t<Params>...> copies(std::forward<Args>(args)...);
  static_assert((sizeof(std::decay_t<Params>) + ... + 0) <= standin::kMaxParameterBytes);
  cudaError_t error = std::exchange(standin::fail_with, cudaSuccess);
  const dim3 grid = config->gridDim;
  const dim3 threads = config->blockDim;
  if (grid.x == 0 || grid.x > standin::kMaxGrid || grid.y != 1 || grid.z != 1 || threads.x == 0 ||
      threads.x > standin::kMaxBlock || threads.y != 1 || threads.z != 1)
    error = cudaErrorInvalidConfiguration;
  if (error != cudaSuccess) return standin::last_error = error;

  ++standin::num_launches;
  standin::last_stream = config->stream;
  gridDim = grid;
  blockDim = threads;
  for (unsigned at = 0; at < grid.x; ++at) {
    blockIdx.x = at;
    standin::block.run(
        threads.x, standin::downwards, [](unsigned thread) { threadIdx.x = thread; },
        [&](unsigned) { std::apply(kernel, copies); });
  }
  return cudaSuccess;
}
