#include "reducer/launchers.h"

#include <utility>

#include "shm/label.h"

namespace fastddp {

Wait AllReduceLauncher::send(const Bucket& bucket,
                             const LaunchNumbers& /*numbers*/,
                             bool waits) const {
  return context_.group.start_all_reduce(bucket.wire, bucket.id.number, waits);
}

Wait AllReduceLauncher::send_sparse(const LaunchId& id,
                                    const at::Tensor& grad,
                                    const LaunchNumbers& /*numbers*/) const {
  return context_.group.start_all_reduce(grad, id.number);
}

HookLauncher::HookLauncher(const Context& context, Hook hook, std::function<void()> let_go)
    : context_(context), hook_(std::move(hook)), let_go_(std::move(let_go)) {}

Wait HookLauncher::send(const Bucket& bucket, const LaunchNumbers& numbers, bool /*waits*/) const {
  std::vector<std::size_t> params;
  std::vector<std::int64_t> offsets;
  for (const SlotPlan& slot : bucket.plan->slots) {
    params.push_back(static_cast<std::size_t>(slot.param));
    offsets.push_back(slot.offset);
  }
  return start({bucket.id.number, numbers.num_gradients(), bucket.gradients, std::move(params),
                std::move(offsets)});
}

Wait HookLauncher::send_sparse(const LaunchId& id,
                               const at::Tensor& grad,
                               const LaunchNumbers& numbers) const {
  return start({id.number, numbers.num_gradients(), grad, {id.index}, {0}});
}

Wait HookLauncher::start(const HookInput& input) const {
  const shm::Label label(
      shm::Label::of(context_.owner.number, static_cast<std::uint32_t>(input.index + 1)));
  return hook_(input);
}

void HookLauncher::end_buckets(std::vector<Launch>& launches) const {
  for (const Launch& launch : launches) {
    context_.record(events::Kind::kWaitBegin, launch.id.number);
    launch.wait();
    context_.record(events::Kind::kWaitEnd, launch.id.number);
  }
  for (Launch& launch : launches) launch.wait = nullptr;
}

void HookLauncher::let_go() const {
  if (let_go_) let_go_();
}

}  // namespace fastddp
