// Tests that the stand-in for CUDA finds the faults that it is meant to find.
#include <cuda_runtime.h>

#include <stdexcept>
#include <vector>

#include "check.h"

namespace {

constexpr unsigned kThreads = 64;

cudaLaunchConfig_t blocks_of(unsigned num_blocks, unsigned num_threads) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(num_threads);
  return config;
}

template <typename... Params, typename... Args>
void launch(unsigned num_blocks, void (*kernel)(Params...), Args... args) {
  const auto config = blocks_of(num_blocks, kThreads);
  CHECK(cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess);
}

__global__ void number(unsigned* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] += 1000 * blockIdx.x + threadIdx.x;
}

// Each thread reads its neighbours on a ring, first the right one and then the left one.
template <bool kBarriers>
__global__ void pass_on(unsigned* out) {
  __shared__ unsigned values[kThreads];
  const unsigned thread = threadIdx.x;
  values[thread] = thread;
  if constexpr (kBarriers) __syncthreads();
  const unsigned right = values[(thread + 1) % kThreads];
  if constexpr (kBarriers) __syncthreads();
  values[thread] = 100 * right;
  if constexpr (kBarriers) __syncthreads();
  out[thread] = values[(thread + kThreads - 1) % kThreads];
  if constexpr (kBarriers) __syncthreads();
  values[thread] = 12345;
}

__global__ void two_barriers() {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void some_leave() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void some_come_once_more() {
  __syncthreads();
  if (threadIdx.x < 3) __syncthreads();
}

__global__ void throws() {
  __syncthreads();
  if (threadIdx.x == 7) throw std::runtime_error("seven");
  __syncthreads();
}

template <bool kBarriers>
bool neighbours_are_right() {
  std::vector<unsigned> out(kThreads);
  launch(2, &pass_on<kBarriers>, out.data());
  for (unsigned i = 0; i < kThreads; ++i)
    if (out[i] != 100 * i) return false;
  return true;
}

}  // namespace

TEST(every_thread_of_every_block_runs_once) {
  std::vector<unsigned> out(3 * kThreads);
  launch(3, &number, out.data());
  for (unsigned i = 0; i < out.size(); ++i) CHECK(out[i] == i / kThreads * 1000 + i % kThreads);
}

TEST(threads_wait_at_barriers_in_either_order) {
  for (const bool downwards : {false, true, false}) {
    standin::downwards = downwards;
    CHECK(neighbours_are_right<true>());
    CHECK(!neighbours_are_right<false>());
  }
}

TEST(barriers_that_do_not_match_are_errors) {
  CHECK_THROWS(launch(1, &two_barriers), std::logic_error);
  CHECK_THROWS(launch(1, &some_leave), std::logic_error);
  CHECK_THROWS(launch(1, &some_come_once_more), std::logic_error);
  CHECK(neighbours_are_right<true>());
}

TEST(what_a_kernel_throws_comes_out_of_the_launch) {
  CHECK_THROWS(launch(1, &throws), std::runtime_error);
  CHECK(neighbours_are_right<true>());
}

TEST(a_launch_that_no_gpu_would_take_fails) {
  for (const auto& config : {blocks_of(0, 1), blocks_of(1, 0), blocks_of(1, 1025)}) {
    CHECK(cudaLaunchKernelEx(&config, &two_barriers) == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaSuccess);
  }
}

int main() { return check::run(); }
