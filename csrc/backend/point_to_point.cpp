#include "backend/point_to_point.h"

#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "backend/errors.h"
#include "backend/handed_work.h"
#include "backend/operands.h"
#include "backend/plain.h"

namespace fastddp {
namespace {

// What a message arrives in is written to at any time until it is waited for: no copy in its place.
void check_received(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(is_plain(tensor),
                      "fastddp: recv into a tensor that is not contiguous, or a conjugated or "
                      "negated view; pass a contiguous one and copy from it");
  }
}

}  // namespace

PointToPoint::PointToPoint(int rank,
                           Starter& starter,
                           Connections& connections,
                           const LocalGroup& local)
    : rank_(rank),
      starter_(starter),
      connections_(connections),
      group_(local.group),
      messages_(local.layout, group_->size(), group_->me()) {}

PointToPoint::Work PointToPoint::send(const Tensors& tensors, int to, int tag) {
  Tensors plain;
  for (const at::Tensor& tensor : tensors) plain.push_back(to_read(tensor));
  return compared(shm::End::kSender, plain, to, tag,
                  [&] { return connections_.inner()->send(plain, to, tag); });
}

PointToPoint::Work PointToPoint::receive(Tensors& tensors, int from, int tag) {
  check_received(tensors);
  return compared(shm::End::kReceiver, tensors, from, tag,
                  [&] { return connections_.inner()->recv(tensors, from, tag); });
}

PointToPoint::Work PointToPoint::receive_from_any(Tensors& tensors, int tag) {
  starter_.check_usable();
  check_received(tensors);
  const std::lock_guard lock(mutex_);
  messages_.take_from_anybody(static_cast<std::uint32_t>(tag));
  return c10::make_intrusive<HandedWork>(connections_.inner()->recvAnysource(tensors, tag), group_,
                                         "recv from any rank with tag " + std::to_string(tag));
}

// Launches one end of a message unless its size is not that of the other end. Gloo ends the process
// that gets more than it has room for, and leaves the rest of what is too large as it was.
PointToPoint::Work PointToPoint::compared(
    shm::End end, const Tensors& tensors, int peer, int tag, const Call& launch) {
  starter_.check_usable();
  const std::size_t place = group_->index_of(peer);
  const bool is_known = place < group_->size() && place != group_->me() && tag >= 0 &&
                        tensors.size() == 1 && can_move(tensors[0]);
  const bool sends = end == shm::End::kSender;
  const std::string text = (sends ? "send to rank " : "recv from rank ") + std::to_string(peer) +
                           " with tag " + std::to_string(tag);
  const std::uint64_t peers = peer >= 0 && peer < 64 ? std::uint64_t{1} << peer : 0;
  const auto work = [&] { return c10::make_intrusive<HandedWork>(launch(), group_, text, peers); };
  if (!is_known) return work();
  const std::lock_guard lock(mutex_);
  const std::uint64_t mine = tensors[0].nbytes();
  const auto theirs = messages_.announce(end, place, static_cast<std::uint32_t>(tag), mine);
  if (theirs && *theirs != mine) {
    group_->abort(c10::str("the ranks do not agree: with tag ", tag, ", rank ",
                           sends ? rank_ : peer, " sends ", sends ? mine : *theirs,
                           " bytes to rank ", sends ? peer : rank_, ", which receives ",
                           sends ? *theirs : mine));
    connections_.close();
    as_torch_error([&] { group_->check(); });
  }
  try {
    return work();
  } catch (...) {
    messages_.withdraw();
    throw;
  }
}

}  // namespace fastddp
