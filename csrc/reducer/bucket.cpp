#include "reducer/bucket.h"

#include <ATen/ATen.h>

namespace fastddp {

void Bucket::cast_back() const {
  if (wire.is_same(flat)) return;
  at::Tensor out = flat;
  out.copy_(wire);
}

std::string describe(const LaunchId& id, const Plan& plan, const Parameters& params) {
  if (id.kind == LaunchKind::kFlags) return "the flags of used parameters";
  if (id.kind == LaunchKind::kSparse)
    return "the sparse gradient of '" + params[id.index].name + "'";
  const auto& slots = plan[id.index].slots;
  std::string text = "bucket " + std::to_string(id.index + 1) + " of " +
                     std::to_string(plan.size()) + " ('" + params[slots.front()].name + "'";
  if (slots.size() > 1) text += " to '" + params[slots.back()].name + "'";
  return text + ")";
}

}  // namespace fastddp
