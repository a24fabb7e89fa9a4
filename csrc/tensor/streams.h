// Order among the streams of a device, for any accelerator. On the CPU, which has no streams, these
// functions do nothing.
//
// Autograd runs a hook on the stream that the parameter's gradient belongs to, so one bucket may be
// filled from several streams. A reader of the bucket has to wait for each of them. (tests/streams)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#ifdef FASTDDP_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include <algorithm>
#include <vector>

namespace fastddp {

inline bool has_streams(c10::Device device) { return !device.is_cpu() && !device.is_meta(); }

inline c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// Returns once the device has done all the work of the current stream. To be used rarely, because
// it stops the host.
inline void drain_current_stream(c10::Device device) {
  if (has_streams(device))
    c10::impl::VirtualGuardImpl(device.type()).synchronizeStream(current_stream(device));
}

// Whether the current stream records work into a graph instead of running it.
inline bool is_capturing(c10::Device device) {
  if (!has_streams(device)) return false;
  const auto ask = [device](const auto& guard) {
    if constexpr (requires { guard.isStreamCapturing(current_stream(device)); }) {
      return guard.isStreamCapturing(current_stream(device));
    } else {  // an older torch, which has no such question
#ifdef FASTDDP_CUDA
      return device.is_cuda() &&
             c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#else
      return false;
#endif
    }
  };
  return ask(*c10::impl::getDeviceGuardImpl(device.type()));
}

// Keeps the memory of a tensor from being used for another one before `stream` is done with it.
inline void outlive(const at::Tensor& tensor, c10::Stream stream) {
  at::Tensor handle = tensor;
  handle.record_stream(stream);
}

// The streams that have worked on one piece of memory.
class Touched {
 public:
  void by_current(c10::Device device) {
    if (!has_streams(device)) return;
    const c10::Stream stream = current_stream(device);
    if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end())
      streams_.push_back(stream);
  }

  // Makes the current stream wait for the work of the other streams so far. From then on only the
  // current stream counts as having touched the memory.
  void by_current_after_all(c10::Device device) {
    if (!has_streams(device)) return;
    const c10::Stream stream = current_stream(device);
    for (const c10::Stream& other : streams_) {
      if (other == stream) continue;
      c10::Event done(device.type());
      done.record(other);
      done.block(stream);
    }
    streams_.assign(1, stream);
  }

 private:
  std::vector<c10::Stream> streams_;
};

}  // namespace fastddp
