#include "reducer/buckets.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "core/marks.h"
#include "reducer/memory.h"
#include "reducer/tensors.h"
#include "tensor/slot.h"
#include "tensor/streams.h"

namespace fastddp {

Buckets::Buckets(const Context& context,
                 Parameters& params,
                 std::shared_ptr<const Plan> plan,
                 const Form& form,
                 bool is_fused)
    : context_(context),
      params_(params),
      plan_(std::move(plan)),
      form_(form),
      is_fused_(is_fused),
      numbers_{plan_->size(), params.num_dense(), params.size()} {
  const std::size_t num_sparse = params_.size() - params_.num_dense();
  const std::size_t num_loose = num_sparse + (form_.packs ? params_.num_dense() : 0);
  if (num_loose > 0) {
    const auto numel = static_cast<std::int64_t>(num_loose);
    const at::Tensor loose =
        allocate(context_, numel + static_cast<std::int64_t>(kNumMarks), at::kFloat);
    loose_ = lend(numbers_.of_flags(), loose, loose, 0, numel, {});
  }
  all_.resize(plan_->size());
  for (std::size_t i = 0; i < plan_->size(); ++i) {
    all_[i].plan = &(*plan_)[i];
    all_[i].id = numbers_.of_bucket(i);
    for (const SlotPlan& slot : all_[i].plan->slots) params_[slot].bucket = i;
    if (!context_.lazy) all_[i] = install(i);
  }
  for (std::size_t i = 0; i < num_sparse; ++i)  // the last ones
    params_[params_.num_dense() + i].place.flag =
        loose_->flags[static_cast<std::int64_t>(num_loose - num_sparse + i)];
}

std::int64_t Buckets::bytes_per_round() const {
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < all_.size(); ++i)
    bytes += (*plan_)[i].numel * static_cast<std::int64_t>(c10::elementSize(dtype_of_wire(i)));
  return bytes;
}

std::vector<Marked> Buckets::marked() const {
  std::vector<Marked> marked;
  for (const Bucket& bucket : all_) {
    if (bucket.marks.defined()) marked.push_back({bucket.id, bucket.marks});
  }
  if (loose_) marked.push_back({loose_->id, loose_->marks});
  return marked;
}

void Buckets::announce_change() {
  for (const Bucket& bucket : all_) {
    if (bucket.sent_marks.defined()) bucket.sent_marks[0].fill_(1);
  }
  if (loose_) loose_->sent_marks[0].fill_(1);
}

bool Buckets::install_lazily(std::size_t index) {
  if (all_[index].flat.defined()) return false;
  all_[index] = install(index);
  return true;
}

void Buckets::leave_to_script() {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    if (params_.is_dense(i)) {
      params_[i].place = Place();
    } else {
      params_[i].place.slot = empty_sparse(params_[i].layout);
    }
  }
  for (Bucket& bucket : all_) {
    Bucket left;
    left.plan = bucket.plan;
    left.id = bucket.id;
    left.flags = bucket.flags.clone();
    left.sent_marks = bucket.sent_marks;
    bucket = std::move(left);
  }
}

void Buckets::begin_round(bool is_captured) {
  is_captured_ |= is_captured;
  if (!is_captured_) leave_what_is_held();
}

// Gives a bucket new memory if the script still refers to gradients in the old.
void Buckets::leave_what_is_held() {
  bool is_any_new = false;
  for (std::size_t i = 0; i < all_.size(); ++i) {
    if (!all_[i].flat.defined() || !is_held(all_[i])) continue;  // lazy ones are nobody's here
    all_[i] = install(i);
    is_any_new = true;
  }
  // Other streams may be the first to write to the new ones.
  if (is_any_new) drain_current_stream(context_.device);
}

Bucket Buckets::install(std::size_t index) {
  const BucketPlan& plan = (*plan_)[index];
  const auto num_slots = static_cast<std::int64_t>(plan.slots.size());
  const auto dtype = dtype_of_gradients(index);
  const at::Tensor wire = allocate(context_, plan.numel, dtype_of_wire(index));
  const at::Tensor flat =
      wire.scalar_type() == dtype ? wire : at::zeros_like(wire, wire.options().dtype(dtype));
  Bucket bucket = lend(all_[index].id, flat, wire, plan.flags_offset, form_.packs ? 0 : num_slots,
                       all_[index].sent_marks);
  bucket.plan = &plan;
  if (form_.packs) {
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < index; ++i)
      begin += static_cast<std::int64_t>((*plan_)[i].slots.size());
    bucket.flags = loose_->flags.narrow(0, begin, num_slots);
    bucket.marks.reset();
  } else if (is_fused_) {
    bucket.ones = at::ones({num_slots}, flat.options());
  }
  for (std::int64_t i = 0; i < num_slots; ++i) {
    const SlotPlan& slot = plan.slots[static_cast<std::size_t>(i)];
    Parameter& param = params_[slot];
    param.place = Place(flat, wire, slot, param.layout, form_.packs, bucket.flags[i]);
  }
  bucket.references = num_references(flat);  // last: views refer to the memory too
  return bucket;
}

// The parts of a buffer with `num_flags` flags, and marks behind them.
Bucket Buckets::lend(LaunchId id,
                     const at::Tensor& flat,
                     const at::Tensor& wire,
                     std::int64_t flags_offset,
                     std::int64_t num_flags,
                     const at::Tensor& sent_marks) const {
  constexpr auto kNumel = static_cast<std::int64_t>(kNumMarks);
  Bucket bucket;
  bucket.id = id;
  bucket.flat = flat;
  if (has_streams(context_.device)) bucket.home = current_stream(context_.device);
  bucket.wire = wire;
  bucket.flags = wire.narrow(0, flags_offset, num_flags);
  if (flags_offset + num_flags + kNumel <= wire.numel())
    bucket.marks = wire.narrow(0, flags_offset + num_flags, kNumel);
  bucket.gradients = flat.narrow(0, 0, flags_offset);
  bucket.sent_marks = sent_marks;
  if (!bucket.sent_marks.defined()) {
    const auto label = label_of(context_.owner.number, static_cast<std::uint32_t>(id.number));
    const Marks marks = marks_of(label, params_.retired);
    bucket.sent_marks = at::tensor(at::ArrayRef<double>(marks), at::kDouble).to(flat.options());
  }
  return bucket;
}

// Whether the script refers to gradients in a bucket. Those that lie in `.grad` as they were handed
// out are the round's own to write over; not if the reducer is retired, for then the next one needs
// them.
bool Buckets::is_held(const Bucket& bucket) const {
  const auto references = num_references(bucket.flat);
  if (references <= bucket.references) return false;
  const auto& slots = bucket.plan->slots;
  const auto in_place = std::count_if(slots.begin(), slots.end(), [this](const SlotPlan& slot) {
    const Parameter& param = params_[slot];
    return !params_.retired && is_alias(param.variable.grad(), param.place.slot);
  });
  return references > bucket.references + static_cast<std::size_t>(in_place);
}

// As real numbers.
at::ScalarType Buckets::dtype_of_gradients(std::size_t index) const {
  const Layout& layout = params_[(*plan_)[index].slots.front()].layout;
  return c10::toRealValueType(c10::typeMetaToScalarType(layout.options.dtype()));
}

at::ScalarType Buckets::dtype_of_wire(std::size_t index) const {
  return form_.wire_dtype(dtype_of_gradients(index));
}

}  // namespace fastddp
