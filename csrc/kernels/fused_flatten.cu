// The kernels' wrappers and their launches. No torch header belongs here: it would make this file
// take minutes instead of seconds.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/dtype_pairs.h"
#include "kernels/fused_flatten.h"
#include "kernels/fused_flatten_body.h"

namespace fastddp {
namespace {

template <typename Compute, std::uint32_t kSpans>
struct MoveArgs {
  void* flat;
  Compute scale;
  Moments* moments;  // one per block
  std::uint32_t num_spans;
  bool to_flat;
  PieceSpan spans[kSpans];
};

static_assert(sizeof(MoveArgs<double, kSmallTable>) <= 4096);
static_assert(sizeof(MoveArgs<double, kLargeTable>) <= 32764);

// Adds the values of the block's threads. Thread 0 gets the sum.
__device__ Moments add_threads(const Moments& value) {
  __shared__ Moments values[kBlockThreads];
  const std::uint32_t thread = threadIdx.x;
  values[thread] = value;
  __syncthreads();
  if (thread < kTreeWidth) add_column(values, thread);
  __syncthreads();
  return thread == 0 ? add_columns(values) : value;
}

// Four blocks with 64 registers per thread fill the registers of a multiprocessor, and have enough
// threads to reach the memory's bandwidth.
template <typename Src, typename Dst, bool kMoments, std::uint32_t kSpans>
__global__ void __launch_bounds__(kBlockThreads, 4)
    move_kernel(const MoveArgs<ComputeOf<Src>, kSpans> __grid_constant__ args) {
  const auto chunk =
      find_chunk<Src, Dst>(args.spans, args.num_spans, blockIdx.x, args.flat, args.to_flat);
  const auto share = move_chunk<kMoments>(chunk, threadIdx.x, args.scale);
  if constexpr (kMoments) {
    const Moments sum = add_threads(as_moments(share));
    if (threadIdx.x == 0) args.moments[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kBlockThreads)
    moments_kernel(const Moments* blocks, std::uint64_t num_blocks, Moments* moments) {
  const Moments sum = add_threads(add_blocks(blocks, num_blocks, threadIdx.x));
  if (threadIdx.x == 0) *moments = sum;
}

template <typename... Params, typename... Args>
void launch(void* stream,
            std::uint32_t num_blocks,
            void (*kernel)(Params...),
            const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kBlockThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here, so clear it for the next caller
  throw std::runtime_error("a kernel of the fused flatten did not launch (" +
                           std::to_string(num_blocks) + " blocks): " + cudaGetErrorString(error));
}

template <std::uint32_t kSpans, typename Src, typename Dst>
void launch_move(const FlattenLaunch& move,
                 void* flat,
                 bool to_flat,
                 double scale,
                 void* stream,
                 Moments* moments) {
  MoveArgs<ComputeOf<Src>, kSpans> args{};
  args.flat = flat;
  args.scale = static_cast<ComputeOf<Src>>(scale);
  args.moments = moments;
  args.num_spans = static_cast<std::uint32_t>(move.spans.size());
  args.to_flat = to_flat;
  std::copy(move.spans.begin(), move.spans.end(), args.spans);
  auto* kernel = moments == nullptr ? &move_kernel<Src, Dst, false, kSpans>
                                    : &move_kernel<Src, Dst, true, kSpans>;
  launch(stream, move.num_blocks, kernel, args);
}

// `moments` has room for an entry per block of all launches, or is null.
void move_all(const std::vector<FlattenLaunch>& launches,
              DType source_dtype,
              DType target_dtype,
              void* flat,
              bool to_flat,
              double scale,
              void* stream,
              Moments* moments) {
  with_types(source_dtype, target_dtype, [&](auto source, auto target) {
    using Src = typename decltype(source)::Type;
    using Dst = typename decltype(target)::Type;
    for (const FlattenLaunch& move : launches) {
      auto* launch_table = move.spans.size() <= kSmallTable ? &launch_move<kSmallTable, Src, Dst>
                                                            : &launch_move<kLargeTable, Src, Dst>;
      launch_table(move, flat, to_flat, scale, stream, moments);
      if (moments != nullptr) moments += move.num_blocks;
    }
  });
}

}  // namespace

namespace cuda {

std::size_t moments_scratch(const std::vector<Piece>& pieces) {
  // The number of blocks for the widest dtype, which has the fewest elements per chunk.
  constexpr std::int64_t kChunk = chunk_numel(DType::kFloat64);
  std::size_t num_blocks = 0;
  for (const Piece& piece : pieces)
    num_blocks += static_cast<std::size_t>((piece.numel + kChunk - 1) / kChunk);
  return num_blocks * (sizeof(Moments) / sizeof(float));
}

void fused_flatten(const FlatPass& pass,
                   const std::vector<Piece>& pieces,
                   void* flat,
                   void* stream,
                   Moments* moments,
                   float* scratch) {
  const auto launches = flatten_launches(pass, pieces);
  if (moments != nullptr && !launches.empty() &&
      (scratch == nullptr || reinterpret_cast<std::uintptr_t>(scratch) % alignof(Moments) != 0))
    throw std::invalid_argument("moments need scratch memory, aligned as a double");
  auto* blocks = moments == nullptr ? nullptr : reinterpret_cast<Moments*>(scratch);
  move_all(launches, pass.piece, pass.flat, flat, true, pass.scale, stream, blocks);
  if (moments == nullptr) return;
  std::uint64_t num_blocks = 0;
  for (const FlattenLaunch& move : launches) num_blocks += move.num_blocks;
  launch(stream, 1, &moments_kernel, blocks, num_blocks, moments);
}

void fused_unflatten(const FlatPass& pass,
                     const std::vector<Piece>& pieces,
                     const void* flat,
                     void* stream) {
  const auto launches = unflatten_launches(pass, pieces);
  // In this direction, `flat` is only read.
  move_all(launches, pass.flat, pass.piece, const_cast<void*>(flat), false, pass.scale, stream,
           nullptr);
}

}  // namespace cuda
}  // namespace fastddp
