#include "backend/connections.h"

#include <ATen/ops/empty.h>

#include <exception>
#include <limits>
#include <utility>

namespace fastddp {
namespace {

constexpr auto kShortest = std::chrono::milliseconds(1);

}  // namespace

Connections::Connections(int rank, int size, c10::intrusive_ptr<c10d::Backend> inner)
    : rank_(rank), size_(size), inner_(std::move(inner)) {}

void Connections::set_lanes(Lanes lanes) { lanes_ = std::move(lanes); }

std::chrono::milliseconds Connections::timeout() const {
  return inner_->getBackendOptions()->timeout;
}

// The inner backend can not be asked to, but closes its connections when a wait takes too long:
// here for a message that nobody sends.
void Connections::close() {
  std::vector<at::Tensor> nothing{at::empty({1}, at::kByte)};
  const int peer = (rank_ + 1) % size_;
  try {
    inner_->recv(nothing, peer, std::numeric_limits<int>::max())->wait(kShortest);
  } catch (const std::exception&) {  // as intended
  }
}

c10::intrusive_ptr<c10d::Backend> Connections::take_lane() {
  return std::exchange(lanes_.backend, {});
}

void Connections::drop() {
  inner_.reset();
  lanes_.backend.reset();
}

void Connections::leak() {
  static_cast<void>(inner_.release());
  static_cast<void>(lanes_.backend.release());
}

}  // namespace fastddp
