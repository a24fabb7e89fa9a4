#include "reducer/round.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "core/slow_wait.h"
#include "reducer/tensors.h"
#include "tensor/error_text.h"
#include "tensor/slot.h"

namespace fastddp {

Round::Round(const Context& context,
             Parameters& params,
             Buckets& buckets,
             std::shared_ptr<const Launcher> launcher,
             const Filler& filler,
             Figures& figures,
             Turn& turn,
             const Manner& manner)
    : context_(context),
      params_(params),
      buckets_(buckets),
      launcher_(std::move(launcher)),
      filler_(filler),
      figures_(figures),
      turn_(turn),
      manner_(manner),
      step_(static_cast<std::uint64_t>(figures.now().rounds)),
      tracker_(*buckets.plan()),
      taken_(params.size(), 0),
      aliases_(params.size()),
      fillings_(buckets.size()),
      leftovers_(params, manner.gives, context.rank()) {
  if (has_streams(context_.device)) stream_ = current_stream(context_.device);
}

// ---- while backward goes on ----------------------------------------------------------

void Round::take(std::size_t index) {
  Parameter& param = params_[index];
  at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined()) return;
  if (!params_.is_dense(index)) {
    take_sparse(index, param);
    grad.reset();
    return;
  }
  const std::size_t bucket = param.bucket;
  Filling& filling = fillings_[bucket];
  if (context_.lazy && buckets_.install_lazily(bucket)) filling.touched.by_current(context_.device);
  if (is_as_handed_out(grad, param.place.slot)) aliases_[index] = grad;
  TORCH_CHECK_TYPE(!grad.is_sparse(), "fastddp: rank ", context_.rank(), ": parameter '",
                   param.name,
                   "' got a sparse gradient, but belongs to no torch.nn.Embedding or EmbeddingBag "
                   "with sparse=True, which is what is looked for when a model is wrapped");
  int& taken = taken_[index];
  if (taken == 0) {
    at::Tensor fitting = param.fitting(grad, context_.rank());
    filling.touched.by_current(context_.device);
    filler_.put(filling, index, std::move(fitting), manner_.scale);
    arrival_.push_back(static_cast<std::int64_t>(index));
  } else {
    TORCH_CHECK(!tracker_.launched(bucket), "fastddp: rank ", context_.rank(), ": parameter '",
                param.name, "' got gradient number ", taken + 1, " of one backward after ", taken,
                " had been sent, as many as it ever got before. This happens when re-entrant "
                "activation checkpoints begin to share a parameter in the midst of training; use "
                "checkpoint(..., use_reentrant=False)");
    const at::Tensor fitting = param.fitting(grad, context_.rank());
    filling.touched.by_current_after_all(context_.device);
    filler_.add(filling, index, fitting, manner_.scale);
  }
  grad.reset();
  if (++taken == param.expected) {
    tracker_.mark(bucket);
    if (tracker_.is_full(bucket)) filler_.complete(filling, buckets_[bucket], manner_.scale);
  }
  launch_next();
}

void Round::take_sparse(std::size_t index, Parameter& param) {
  touched_sparse_.by_current_after_all(context_.device);
  const at::Tensor scaled = scale_sparse(param.variable.grad(), manner_.scale);
  param.place.slot = taken_[index]++ == 0 ? scaled : param.place.slot + scaled;
}

// Launches the buckets that are full, in the order of the plan.
void Round::launch_next() {
  if (!manner_.knows_counts || !manner_.is_early) return;
  while (tracker_.is_next_full() && turn_.has_come()) {
    launch(tracker_.pop(), false);
    if (is_all_launched()) turn_.end();
  }
}

bool Round::is_all_launched() const { return tracker_.all_launched() && !manner_.is_followed; }

// ---- launching -----------------------------------------------------------------------

void Round::launch_rest(bool waits) {
  for (auto bucket = tracker_.pop(); bucket != ReadyTracker::kNone; bucket = tracker_.pop())
    launch(bucket, waits && launcher_->may_launch_late());
  for (std::size_t i = params_.num_dense(); i < params_.size(); ++i) launch_sparse(i);
  launcher_->end_buckets(launches_);
  launch_flags();
}

// Fills in what this rank has no gradient for, then sends the bucket on its way.
void Round::launch(std::size_t index, bool waits) {
  note_launch();
  Filling& filling = fillings_[index];
  context_.record(events::Kind::kFillBegin, index);
  if (context_.lazy && buckets_.install_lazily(index)) filling.touched.by_current(context_.device);
  const Bucket& bucket = buckets_[index];
  filling.touched.by_current_after_all(context_.device);
  if (!filling.is_flattened) {
    std::vector<std::size_t> missing;
    const auto& slots = bucket.plan->slots;
    for (std::size_t slot = 0; slot < slots.size(); ++slot) {
      if (taken_[static_cast<std::size_t>(slots[slot].param)] == 0) missing.push_back(slot);
    }
    const auto take = [this](std::size_t param) { return take_leftover(param); };
    filler_.fill_missing(filling, bucket, missing, take, manner_.scale);
  }
  context_.record(events::Kind::kLaunch, bucket.id.number, bytes_in(bucket.wire));
  launches_.push_back({bucket.id, launcher_->send(bucket, buckets_.numbers(), waits)});
}

void Round::launch_sparse(std::size_t index) {
  note_launch();
  const LaunchNumbers& numbers = buckets_.numbers();
  const LaunchId id = numbers.of_sparse(index);
  context_.record(events::Kind::kFillBegin, id.number);
  Parameter& param = params_[index];
  touched_sparse_.by_current_after_all(context_.device);
  param.place.flag.fill_(1);
  if (taken_[index] == 0) {
    const Leftover leftover = take_leftover(index);
    param.place.slot = leftover.grad.defined() ? scale_sparse(leftover.grad, manner_.scale)
                                               : empty_sparse(param.layout);
    if (!leftover.counts) param.place.flag.zero_();
  }
  context_.record(events::Kind::kLaunch, id.number, bytes_in(param.place.slot));
  launches_.push_back({id, launcher_->send_sparse(id, param.place.slot, numbers)});
}

void Round::launch_flags() {
  const auto& loose = buckets_.loose();
  if (!loose) return;
  for (Filling& filling : fillings_) filling.touched.by_current_after_all(context_.device);
  loose->marks.copy_(loose->sent_marks);
  context_.record(events::Kind::kLaunch, loose->id.number, bytes_in(loose->flat));
  launches_.push_back({loose->id, context_.group.start_all_reduce(loose->flat, loose->id.number)});
}

void Round::note_launch() {
  if (!launched_) launched_ = std::chrono::steady_clock::now();
}

Leftover Round::take_leftover(std::size_t param) { return leftovers_.take(param, aliases_[param]); }

std::vector<std::int64_t> Round::order_of_arrival() const {
  std::vector<std::int64_t> order = arrival_;
  for (const BucketPlan& bucket : *buckets_.plan()) {
    for (const SlotPlan& slot : bucket.slots) {
      if (taken_[static_cast<std::size_t>(slot.param)] == 0) order.push_back(slot.param);
    }
  }
  return order;
}

// ---- the end -------------------------------------------------------------------------

void Round::wait() {
  for (const Launch& launch : launches_) {
    if (!launch.wait) continue;
    context_.record(events::Kind::kWaitBegin, launch.id.number);
    try {
      launch.wait();
    } catch (const Interruption&) {
      throw;
    } catch (const std::exception& error) {
      TORCH_CHECK_WITH(DistBackendError, false, "fastddp: rank ", context_.rank(),
                       ": the all-reduce of ", describe(launch.id, *buckets_.plan(), params_),
                       " failed: ", text_of(error));
    }
    context_.record(events::Kind::kWaitEnd, launch.id.number);
    if (launch.id.kind == LaunchKind::kBucket) buckets_[launch.id.index].cast_back();
  }
}

double Round::us_since_launch() const { return launched_ ? us_since(*launched_) : 0; }

void Round::hand_out() {
  for (Parameter& param : params_) param.forget_left();
  if (params_.retired) return;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    Parameter& param = params_[i];
    param.expected = std::max(param.expected, taken_[i]);
    if (!params_.is_dense(i)) {
      param.variable.mutable_grad() = param.place.slot;
    } else if (aliases_[i].defined()) {
      param.variable.mutable_grad() = std::move(aliases_[i]);
    } else {
      param.variable.mutable_grad() = param.place.slot.variable_data();
    }
  }
  read_flags();
  for (Bystander& bystander : leftovers_.bystanders()) {
    Parameter& param = params_[bystander.param];
    if (param.used) continue;
    param.variable.mutable_grad() = std::move(bystander.grad);
    if (figures_.now().rounds == 0) figures_.add_unused(param.name);
  }
  for (const Bucket& bucket : buckets_) {  // `.grad` is going to be used here
    if (!bucket.home || current_stream(context_.device) == *bucket.home) continue;
    outlive(bucket.flat, current_stream(context_.device));
    outlive(bucket.wire, current_stream(context_.device));
  }
}

// Of the bystanders, whether any rank had a gradient. From a GPU they are read all at once; this is
// where the host waits, on a rank that has bystanders. A graph cannot: it goes by what was read
// last.
void Round::read_flags() {
  const auto& bystanders = leftovers_.bystanders();
  if (bystanders.empty() || is_capturing(context_.device)) return;
  if (context_.device.is_cpu()) {
    for (const Bystander& bystander : bystanders) {
      Parameter& param = params_[bystander.param];
      param.used = param.place.flag.item<double>() != 0;
    }
    return;
  }
  std::vector<at::Tensor> flags;
  for (const Bystander& bystander : bystanders)
    flags.push_back(params_[bystander.param].place.flag);
  const at::Tensor all = at::stack(flags).to(at::kCPU, at::kDouble);
  const auto* flag = all.const_data_ptr<double>();
  for (const Bystander& bystander : bystanders) params_[bystander.param].used = *flag++ != 0;
}

void Round::leave_buckets() {
  launches_.clear();
  fillings_.clear();
  launcher_->let_go();
  buckets_.leave_to_script();
}

std::vector<Wait> Round::waits() const {
  std::vector<Wait> waits;
  for (const Launch& launch : launches_) {
    if (launch.wait) waits.push_back(launch.wait);
  }
  return waits;
}

std::vector<std::size_t> Round::unused() const {
  std::vector<std::size_t> params;
  for (const Bystander& bystander : leftovers_.bystanders()) params.push_back(bystander.param);
  return params;
}

bool Round::is_empty() const {
  const bool is_known = !params_.retired && !has_streams(context_.device);
  if (!is_known || manner_.gives == Gives::kWhatIsThere) return false;
  return leftovers_.bystanders().size() == params_.size() &&
         std::none_of(params_.begin(), params_.end(),
                      [](const Parameter& param) { return param.used; });
}

}  // namespace fastddp
