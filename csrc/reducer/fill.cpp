#include "reducer/fill.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "tensor/slot.h"

namespace fastddp {
namespace {

// In profiles. (tests/parity/test_profile.py)
constexpr const char* kFillBucket = "fastddp.reducer::fill_bucket";

}  // namespace

Leftover Leftovers::take(std::size_t index, at::Tensor& alias) {
  if (params_.retired) return {{}, false};  // it is for the reducer that comes after this one
  const Parameter& param = params_[index];
  at::Tensor grad = std::move(param.variable.mutable_grad());
  at::Tensor old = grad;
  // What unsynchronised backwards left counts as this one's.
  bool accumulated = gives_ == Gives::kWhatIsThere
                         ? grad.defined()
                         : gives_ == Gives::kBackward && param.is_accumulated(grad);
  const bool is_dense = params_.is_dense(index);
  if (is_dense && is_as_handed_out(grad, param.place.slot)) alias = grad;
  if (is_dense && grad.defined()) {
    try {
      grad = param.fitting(grad.is_sparse() ? grad.to_dense() : grad, rank_);
    } catch (const c10::Error&) {
      if (!error_) error_ = std::current_exception();
      grad.reset();
      accumulated = false;
    }
  }
  // The reduction overwrites the slot. If no rank has a new gradient the old must come back bit for
  // bit.
  if (is_dense && grad.defined() && !accumulated && grad.is_alias_of(param.place.slot))
    old = grad.clone();
  if (gives_ == Gives::kNothing) grad.reset();
  if (!accumulated) bystanders_.push_back({index, std::move(old)});
  return {std::move(grad), accumulated};
}

void OneByOne::put(Filling& /*filling*/, std::size_t param, at::Tensor grad, double scale) const {
  params_[param].place.write(grad, scale);
}

void OneByOne::add(Filling& /*filling*/,
                   std::size_t param,
                   const at::Tensor& grad,
                   double scale) const {
  params_[param].place.add(grad, scale);
}

void OneByOne::fill_missing(Filling& /*filling*/,
                            const Bucket& bucket,
                            const std::vector<std::size_t>& missing,
                            TakeLeftover take_leftover,
                            double scale) const {
  RECORD_FUNCTION(kFillBucket, std::vector<c10::IValue>{bucket.flat});
  bucket.flags.fill_(1);
  if (bucket.carries_flags()) bucket.marks.copy_(bucket.sent_marks);
  for (const std::size_t slot : missing) {
    const auto param = static_cast<std::size_t>(bucket.plan->slots[slot].param);
    const Leftover leftover = take_leftover(param);
    const Place& place = params_[param].place;
    if (leftover.grad.defined()) {
      place.write(leftover.grad, scale);
    } else {
      place.clear();
    }
    if (!leftover.counts) place.flag.zero_();
  }
}

void Fused::put(Filling& filling, std::size_t param, at::Tensor grad, double /*scale*/) const {
  filling.pending.push_back({param, std::move(grad), current_stream(device_)});
}

void Fused::add(Filling& filling, std::size_t param, const at::Tensor& grad, double scale) const {
  const auto first = std::find_if(filling.pending.begin(), filling.pending.end(),
                                  [param](const Pending& one) { return one.param == param; });
  if (first != filling.pending.end()) {
    const c10::Stream stream = current_stream(device_);
    if (first->stream != stream) outlive(first->grad, stream);
    params_[param].place.write(first->grad, scale);
    filling.pending.erase(first);
  }
  params_[param].place.add(grad, scale);
}

void Fused::complete(Filling& filling, const Bucket& bucket, double scale) const {
  const auto nothing = [](std::size_t) { return Leftover{}; };
  fill_missing(filling, bucket, {}, nothing, scale);
}

// What was put by, what is missing, and the flags: in one pass.
void Fused::fill_missing(Filling& filling,
                         const Bucket& bucket,
                         const std::vector<std::size_t>& missing,
                         TakeLeftover take_leftover,
                         double scale) const {
  if (filling.is_flattened) return;
  RECORD_FUNCTION(kFillBucket, std::vector<c10::IValue>{bucket.flat});
  filling.touched.by_current_after_all(device_);
  std::vector<FlatPiece> pieces;
  pieces.reserve(filling.pending.size() + missing.size() + 1);
  for (const Pending& one : filling.pending) {
    if (one.stream != current_stream(device_)) outlive(one.grad, current_stream(device_));
    add_piece(pieces, bucket, one.param, one.grad, scale);
  }
  std::vector<std::size_t> uncounted;
  for (const std::size_t slot : missing) {
    const auto param = static_cast<std::size_t>(bucket.plan->slots[slot].param);
    const Leftover leftover = take_leftover(param);
    // Whatever stream it is from.
    if (leftover.grad.defined() && has_streams(device_))
      outlive(leftover.grad, current_stream(device_));
    add_piece(pieces, bucket, param, leftover.grad, scale);
    if (!leftover.counts) uncounted.push_back(slot);
  }
  if (bucket.carries_flags()) {
    add_flags(pieces, bucket, uncounted);
  } else {
    bucket.flags.fill_(1);
    for (const std::size_t slot : uncounted) bucket.flags[static_cast<std::int64_t>(slot)].zero_();
  }
  flatten(bucket.wire, pieces, bucket.flat.scalar_type(), scale);
  filling.pending.clear();
  filling.is_flattened = true;
}

// A gradient that does not lie as its place does goes there by itself. Autograd makes none such.
void Fused::add_piece(std::vector<FlatPiece>& pieces,
                      const Bucket& bucket,
                      std::size_t param,
                      const at::Tensor& lazy_grad,
                      double scale) const {
  const Place& place = params_[param].place;
  const auto offset = place.sent.storage_offset();
  if (!lazy_grad.defined()) {
    pieces.push_back({{}, offset, place.sent.numel()});
    return;
  }
  at::Tensor grad = as_real(resolved(lazy_grad));
  if (lies_like(place.sent, grad) && grad.scalar_type() == bucket.flat.scalar_type()) {
    pieces.push_back({grad, offset, grad.numel()});
  } else {
    place.write(grad, scale);
  }
}

// Flags in runs of ones between zeros, and the marks behind them.
void Fused::add_flags(std::vector<FlatPiece>& pieces,
                      const Bucket& bucket,
                      const std::vector<std::size_t>& uncounted) const {
  const std::int64_t flags_offset = bucket.plan->flags_offset;
  std::int64_t begin = 0;
  const auto add_ones = [&](std::int64_t end) {
    if (end > begin)
      pieces.push_back(
          {bucket.ones.narrow(0, begin, end - begin), flags_offset + begin, end - begin});
  };
  for (const std::size_t slot : uncounted) {
    const auto at = static_cast<std::int64_t>(slot);
    add_ones(at);
    pieces.push_back({{}, flags_offset + at, 1});
    begin = at + 1;
  }
  add_ones(static_cast<std::int64_t>(bucket.plan->slots.size()));
  pieces.push_back({bucket.sent_marks, bucket.marks.storage_offset() - bucket.wire.storage_offset(),
                    bucket.marks.numel()});
}

}  // namespace fastddp
