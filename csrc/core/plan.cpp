#include "core/plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/marks.h"

namespace fastddp {
namespace {

std::int64_t align_up(std::int64_t numel, std::int64_t element_bytes, std::int64_t align_bytes) {
  const std::int64_t step = std::max<std::int64_t>(1, align_bytes / element_bytes);
  return (numel + step - 1) / step * step;
}

void check(const std::vector<ParamSpec>& params,
           const std::vector<std::int64_t>& order,
           const std::vector<std::int64_t>& caps_bytes) {
  if (caps_bytes.empty()) throw std::invalid_argument("plan_buckets: no bucket cap was given");
  if (order.size() != params.size()) {
    throw std::invalid_argument("plan_buckets: the order names " + std::to_string(order.size()) +
                                " parameters of " + std::to_string(params.size()));
  }
  std::vector<bool> seen(params.size(), false);
  for (const std::int64_t param : order) {
    const auto index = static_cast<std::size_t>(param);
    if (param < 0 || index >= params.size() || seen[index]) {
      throw std::invalid_argument("plan_buckets: the order is not a permutation, see entry " +
                                  std::to_string(param));
    }
    seen[index] = true;
  }
}

// A bucket that still takes slots, and the arrival of its latest slot.
struct Filling {
  BucketPlan bucket;
  std::int64_t element_bytes = 0;
  std::size_t last_arrival = 0;
};

Filling closed(Filling filling, std::int64_t align_bytes) {
  BucketPlan& bucket = filling.bucket;
  bucket.flags_offset = bucket.numel;
  bucket.numel = align_up(bucket.numel + static_cast<std::int64_t>(bucket.slots.size() + kNumMarks),
                          filling.element_bytes, align_bytes);
  return filling;
}

}  // namespace

std::vector<BucketPlan> plan_buckets(const std::vector<ParamSpec>& params,
                                     const std::vector<std::int64_t>& order,
                                     const std::vector<std::int64_t>& caps_bytes,
                                     std::int64_t align_bytes) {
  check(params, order, caps_bytes);
  std::map<std::int64_t, Filling> open;            // by kind
  std::map<std::int64_t, std::size_t> num_closed;  // by kind
  std::vector<Filling> done;
  for (std::size_t arrival = 0; arrival < order.size(); ++arrival) {
    const ParamSpec& param = params[static_cast<std::size_t>(order[arrival])];
    Filling& filling = open[param.kind];
    filling.bucket.kind = param.kind;
    filling.element_bytes = param.element_bytes;
    filling.last_arrival = arrival;
    BucketPlan& bucket = filling.bucket;
    bucket.slots.push_back({order[arrival], bucket.numel, param.numel});
    bucket.numel = align_up(bucket.numel + param.numel, param.element_bytes, align_bytes);

    std::size_t& nth = num_closed[param.kind];
    if (bucket.numel * param.element_bytes >= caps_bytes[std::min(nth, caps_bytes.size() - 1)]) {
      done.push_back(closed(std::move(filling), align_bytes));
      open.erase(param.kind);
      ++nth;
    }
  }
  for (auto& [kind, filling] : open) done.push_back(closed(std::move(filling), align_bytes));
  std::sort(done.begin(), done.end(),
            [](const Filling& a, const Filling& b) { return a.last_arrival < b.last_arrival; });

  std::vector<BucketPlan> plan;
  plan.reserve(done.size());
  for (Filling& filling : done) plan.push_back(std::move(filling.bucket));
  return plan;
}

}  // namespace fastddp
