#include "backend/crossing.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>

#include <cstdint>
#include <string>
#include <utility>

#include "backend/dtypes.h"

namespace fastddp {

Crossing::Crossing(Lane lane, shm::Group& group, Element element, Reduction reduction)
    : lane_(std::move(lane)),
      group_(group),
      dtype_(torch_dtype_of(element)),
      op_(torch_op_across_hosts(reduction)) {}

// Gloo ends the process that gets more than it has room for, and adds up what is of other types.
void Crossing::compare(const shm::Call& call) {
  const at::Tensor mine =
      at::tensor({static_cast<std::int64_t>(call.element),
                  static_cast<std::int64_t>(call.reduction), static_cast<std::int64_t>(call.numel),
                  static_cast<std::int64_t>(call.label), static_cast<std::int64_t>(group_.count())},
                 at::kLong);
  const auto all = lane_.gather(mine);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i].equal(mine)) continue;
    const auto* const theirs = all[i].const_data_ptr<std::int64_t>();
    const shm::Call others{.kind = call.kind,
                           .element = static_cast<Element>(theirs[0]),
                           .reduction = static_cast<Reduction>(theirs[1]),
                           .numel = static_cast<std::uint64_t>(theirs[2]),
                           .label = static_cast<std::uint64_t>(theirs[3])};
    const std::string who = "rank " + std::to_string(lane_.ranks()[i]);
    group_.fail("the hosts do not agree: " +
                group_.describe_difference("here the ranks", call, who, others) +
                (theirs[4] == mine[4].item<std::int64_t>()
                     ? ""
                     : " as collective " + std::to_string(theirs[4]) +
                           "; has one host refused a call for its arguments?"));
  }
}

void Crossing::start(void* data, std::size_t numel) {
  if (numel == 0) return under_way_.push_back({});
  const auto part = at::from_blob(data, {static_cast<std::int64_t>(numel)}, dtype_);
  under_way_.push_back(lane_.all_reduce(part, op_));
}

void Crossing::finish() {
  const auto work = std::move(under_way_.front());
  under_way_.pop_front();
  if (work) lane_.await(*work);
}

}  // namespace fastddp
