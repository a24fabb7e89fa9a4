#include "reducer/installation.h"

#include <optional>
#include <utility>

#include "shm/heap.h"
#include "tensor/streams.h"

namespace fastddp {

Installation::Installation(const Context& context,
                           Parameters& params,
                           std::vector<std::int64_t> caps_bytes,
                           bool is_fused)
    : context_(context),
      params_(params),
      caps_bytes_(std::move(caps_bytes)),
      is_fused_(is_fused),
      plan_(std::make_shared<const Plan>()),
      former_(context.device) {}

bool Installation::replan(const std::vector<std::int64_t>& order, const Form& form) {
  auto plan = plan_buckets(params_.specs(), order, caps_bytes_, form.align_bytes());
  if (plan == *plan_) return false;
  plan_ = std::make_shared<const Plan>(std::move(plan));
  uninstall();
  return true;
}

std::vector<std::int64_t> Installation::order() const {
  std::vector<std::int64_t> order;
  for (const BucketPlan& bucket : *plan_) {
    for (const SlotPlan& slot : bucket.slots) order.push_back(slot.param);
  }
  return order;
}

Buckets& Installation::install(const Form& form) {
  former_.settle();
  std::optional<shm::Heap::KeepsPages> keeps_pages;
  if (context_.runs_inline) keeps_pages.emplace(shm::Heap::mine());
  // Frees the old buckets before the new are allocated.
  former_.release();
  params_.drop_places();
  auto buckets = std::make_unique<Buckets>(context_, params_, plan_, form, is_fused_);
  drain_current_stream(context_.device);  // other streams may be the first to write to the buckets
  buckets_ = std::move(buckets);
  return *buckets_;
}

void Installation::uninstall(std::vector<Wait> waits) {
  former_.keep(std::move(buckets_), std::move(waits));
}

}  // namespace fastddp
