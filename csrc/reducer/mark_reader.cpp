#include "reducer/mark_reader.h"

#include <ATen/ATen.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "core/marks.h"
#include "core/slow_wait.h"
#include "tensor/streams.h"

namespace fastddp {

bool MarkReader::read(const Buckets& buckets) {
  RoundMarks marks{buckets.plan(), buckets.marked()};
  if (!has_streams(context_.device)) return check(marks);
  if (is_capturing(context_.device)) return false;
  std::vector<at::Tensor> rows;
  for (Marked& one : marks.marked) rows.push_back(std::move(one.marks));
  const at::Tensor copy = at::stack(rows).to(at::kCPU, /*non_blocking=*/true);
  late_.push_back({copy, std::move(marks), c10::Event(context_.device.type())});
  late_.back().done.record(current_stream(context_.device));
  return params_.retired && take_late(true);
}

bool MarkReader::take_late(bool waits) {
  bool has_changed = false;
  while (!late_.empty() && (waits || late_.front().done.query())) {
    LateMarks late = std::move(late_.front());
    late_.pop_front();
    if (waits) late.done.synchronize();
    for (std::size_t i = 0; i < late.marks.marked.size(); ++i)
      late.marks.marked[i].marks = late.rows[static_cast<std::int64_t>(i)];
    has_changed |= check(late.marks);
  }
  return has_changed;
}

void MarkReader::leave(std::vector<Wait> waits, const Buckets& buckets) {
  left_ = Left{std::move(waits), {buckets.plan(), buckets.marked()}, /*has_changed=*/false};
}

void MarkReader::leave_news() { left_ = Left{{}, {}, /*has_changed=*/true}; }

bool MarkReader::read_left_news() {
  if (!left_) return false;
  const Left left = *std::exchange(left_, std::nullopt);
  try {
    for (const Wait& wait : left.waits) wait();
    return check(left.marks) || left.has_changed;
  } catch (const Interruption&) {
    left_ = left;
    throw;
  } catch (const std::exception&) {  // what comes next on the group says more
    return left.has_changed;
  }
}

bool MarkReader::check(const RoundMarks& marks) const {
  bool any = false;
  const Owner& owner = context_.owner;
  for (const auto& [id, sums] : marks.marked) {
    const at::Tensor host = sums.to(at::kCPU, at::kDouble);
    const auto label = label_of(owner.number, static_cast<std::uint32_t>(id.number));
    if (is_mixed(label, host.const_data_ptr<double>())) {
      const std::string others = order_.others(owner.number);
      TORCH_CHECK(false, "fastddp: rank ", context_.rank(), ": ",
                  describe(id, *marks.plan, params_), " of ", owner.title,
                  " was added up with a bucket of another model on the same group (",
                  others.empty() ? "none that this rank has" : others,
                  "), so these gradients are wrong; run the models' forwards in the same order on "
                  "all ranks");
    }
    any |= any_changed(host.const_data_ptr<double>());
  }
  return any;
}

}  // namespace fastddp
