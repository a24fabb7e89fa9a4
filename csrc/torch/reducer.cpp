#include "torch/reducer.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <numeric>
#include <thread>

#include "torch/dtype.h"
#include "torch/error_text.h"
#include "torch/flatten.h"
#include "torch/slot.h"
#include "torch/streams.h"

namespace fastddp {
namespace {

// Hides Python objects from what a collective copies of the thread's state.
//
// During a backward, torch keeps Python's context variables in thread-local state, and a collective
// copies that into its work. The transport's thread often frees the last copy, for which it needs
// the GIL; if the interpreter is ending just then, the process aborts. (test_launch.py)
class WithoutPythonObjects {
 public:
  WithoutPythonObjects() { at::impl::ThreadLocalPythonObjects::set_state({}); }
  ~WithoutPythonObjects() { at::impl::ThreadLocalPythonObjects::set_state(std::move(saved_)); }
  WithoutPythonObjects(const WithoutPythonObjects&) = delete;
  WithoutPythonObjects& operator=(const WithoutPythonObjects&) = delete;

 private:
  at::impl::ThreadLocalPythonObjects saved_ = at::impl::ThreadLocalPythonObjects::get_state();
};

// grad * scale, with one dimension of indices like an embedding's.
at::Tensor scale_sparse(const at::Tensor& grad, double scale) {
  return at::mul(grad.is_sparse() ? grad : grad.to_sparse(1),
                 at::native::wrapped_scalar_tensor(scale));
}

at::Tensor empty_sparse(const at::Tensor& variable) {
  const auto options = variable.options().requires_grad(false);
  auto values_shape = variable.sizes().vec();
  values_shape.front() = 0;
  return at::sparse_coo_tensor(at::empty({1, 0}, options.dtype(at::kLong)),
                               at::empty(values_shape, options), variable.sizes());
}

// Our own backend runs a collective in the thread that launches it, if that is going to wait.
bool runs_inline(c10d::ProcessGroup& group, const std::vector<at::Tensor>& params) {
  if (params.empty() || !params.front().is_cpu()) return false;
  try {
    return group.getBackend(at::kCPU)->getBackendName() == "shm";
  } catch (const c10::Error&) {  // a group of the user's making, which has no backends
    return false;
  }
}

double us_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

struct GradientHook final : torch::autograd::FunctionPostHook {
  GradientHook(std::weak_ptr<Reducer> owner, std::size_t param)
      : reducer(std::move(owner)), index(param) {}

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& outputs,
      const torch::autograd::variable_list& gradients) override {
    // A node runs without a gradient too, when a custom backward returns none.
    if (!gradients.front().defined()) return outputs;
    if (const auto alive = reducer.lock()) alive->on_gradient(index);
    return outputs;
  }

  const std::weak_ptr<Reducer> reducer;
  const std::size_t index;
};

// Lives in the backward's list of final callbacks: either it is called at the backward's end or,
// when the backward raised, it is destroyed with the list. No round is left open in either case.
struct RoundEnd {
  explicit RoundEnd(std::shared_ptr<Reducer> owner) : reducer(std::move(owner)) {}
  RoundEnd(const RoundEnd&) = delete;
  RoundEnd& operator=(const RoundEnd&) = delete;
  ~RoundEnd() {
    if (open) reducer->abandon_round();
  }
  void reach() {
    open = false;
    reducer->finish_round();
  }

  const std::shared_ptr<Reducer> reducer;
  // Set once the callback is queued: abandon_round() takes the lock that queueing holds.
  bool open = false;
};

Reducer::Reducer(std::vector<at::Tensor> params,
                 std::vector<std::string> names,
                 std::size_t num_sparse,
                 std::vector<at::Tensor> frozen,
                 const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                 std::vector<std::int64_t> caps_bytes,
                 std::optional<at::ScalarType> comm_dtype,
                 std::optional<bool> flattens)
    : group_(group),
      rank_(group->getRank()),
      caps_bytes_(std::move(caps_bytes)),
      frozen_(std::move(frozen)),
      device_(params.empty() ? c10::Device(c10::kCPU) : params.front().device()),
      comm_dtype_(comm_dtype),
      flattens_(flattens.value_or(!device_.is_cpu())),
      runs_inline_(runs_inline(*group, params)),
      divisor_(group->getSize()) {
  TORCH_CHECK_VALUE(params.size() == names.size() && num_sparse <= params.size(),
                    "fastddp: ", params.size(), " parameters, ", num_sparse,
                    " of them sparse, but ", names.size(), " names");
  const std::size_t num_dense = params.size() - num_sparse;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const auto known = dtype_of(params[i].scalar_type());
    TORCH_CHECK_TYPE(known, "fastddp: parameter '", names[i], "' has dtype ",
                     params[i].scalar_type(),
                     "; gradients can be float32, float64, float16, bfloat16 or complex");
    const DType dtype = *known;
    if (i < num_dense) {
      specs_.push_back({static_cast<std::int64_t>(real_numel(params[i])),
                        static_cast<std::int64_t>(size_of(dtype)),
                        static_cast<std::int64_t>(dtype)});
    }
    params_.push_back({.variable = std::move(params[i]), .name = std::move(names[i])});
  }
  // Until the arrival order is known: gradients come back roughly in the reverse of the order of
  // registration.
  std::vector<std::int64_t> order(num_dense);
  std::iota(order.rbegin(), order.rend(), 0);
  replan(order);
}

void Reducer::attach() {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    const bool trains = params_[i].variable.requires_grad();
    params_[i].variable.set_requires_grad(true);  // else there is no accumulator
    params_[i].accumulator = torch::autograd::impl::grad_accumulator(params_[i].variable);
    params_[i].variable.set_requires_grad(trains);
    params_[i].hook =
        params_[i].accumulator->add_post_hook(std::make_unique<GradientHook>(weak_from_this(), i));
  }
}

void Reducer::watch(const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad() || output.is_leaf()) continue;
    output.register_hook([reducer = weak_from_this()](const at::Tensor& /*grad*/) {
      if (const auto alive = reducer.lock()) alive->on_backward();
    });
  }
}

void Reducer::set_divisor(double divisor) {
  const std::lock_guard lock(mutex_);
  divisor_ = divisor;
}

void Reducer::set_hook(Hook hook) {
  const std::lock_guard lock(mutex_);
  hook_ = std::move(hook);
  std::vector<std::int64_t> order;
  for (const BucketPlan& bucket : plan_) {
    for (const SlotPlan& slot : bucket.slots) order.push_back(slot.param);
  }
  replan(order);
  installed_ = false;  // slots and flags lie elsewhere now
}

void Reducer::set_after_round(std::function<void()> callback) {
  const std::lock_guard lock(mutex_);
  after_round_ = std::move(callback);
}

void Reducer::close() {
  const std::lock_guard lock(mutex_);
  for (Param& param : params_) {
    if (param.accumulator) param.accumulator->del_post_hook(param.hook);
    param.accumulator.reset();
  }
  closed_ = true;
}

Stats Reducer::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<BucketPlan> Reducer::plan() const {
  const std::lock_guard lock(mutex_);
  return plan_;
}

std::vector<std::string> Reducer::unused() const {
  const std::lock_guard lock(mutex_);
  return unused_;
}

bool Reducer::outgrown() const {
  return std::any_of(frozen_.begin(), frozen_.end(),
                     [](const at::Tensor& param) { return param.requires_grad(); });
}

// ---- called by autograd --------------------------------------------------------------

void Reducer::on_backward() {
  // Not empty for autograd.grad() and backward(inputs=...), which need not involve the other ranks.
  if (!torch::autograd::get_current_graph_task_exec_info()->empty()) return;
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  const auto trains = [](const Param& param) { return param.variable.requires_grad(); };
  if (closed_ || round_ || !sync_ || std::none_of(params_.begin(), params_.end(), trains)) return;
  begin_round(false);
  queue_end();
}

void Reducer::on_gradient(std::size_t param) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  if (!round_) {
    if (!sync_) {
      params_[param].accumulated = params_[param].variable.grad().getIntrusivePtr();
      return;
    }
    begin_round(false);
    queue_end();
  }
  take(param);
}

void Reducer::finish_round() {
  const std::lock_guard lock(mutex_);
  if (!round_) return;
  const c10::NoGradGuard no_grad;
  try {
    const auto start = std::chrono::steady_clock::now();
    flush(true);
    for (std::size_t launch = 0; launch < round_->waits.size(); ++launch) {
      wait_for(launch);
      cast_back(launch);
    }
    stats_.wait_us_last = us_since(start);
    hand_out();
  } catch (...) {
    drop_round();
    throw;
  }
  stats_.wait_us_total += stats_.wait_us_last;
  ++stats_.rounds;
  stats_.overlaps = round_->is_early;
  if (!round_->is_shadow) schedule_.add(round_->is_early, us_since(round_->begin));
  end_round();
  const auto after_round = after_round_;  // it may set another
  if (after_round) after_round();
}

void Reducer::abandon_round() noexcept {
  const std::lock_guard lock(mutex_);
  if (!round_) return;
  const c10::NoGradGuard no_grad;
  // Autograd's thread, with no node running, is on the default stream, which nothing orders behind
  // the round before.
  c10::OptionalStreamGuard guard(round_->stream);
  try {
    flush(false);
  } catch (...) {  // the backward's own exception is on its way to the user and says more
  }
  drop_round();
}

// Collectives may still write to the buckets, so the next round gets its own. On a GPU memory is
// free for others as soon as it is dropped here, so it is held until then; on the CPU the transport
// holds it.
void Reducer::drop_round() {
  if (has_streams(device_))
    std::move(round_->waits.begin(), round_->waits.end(), std::back_inserter(abandoned_));
  end_round();
  installed_ = false;
}

// When a backward on a GPU raises, the thread that autograd ran it in may be the last to let go of
// it, a moment after the caller got its exception. What the caller launches next would come before
// the rest of the round, on this rank alone. (tests/streams/test_abandoned_rounds.py)
bool Reducer::settle() const {
  constexpr auto kPatience = std::chrono::seconds(10);
  if (!is_in_round_ || !has_streams(device_) || torch::autograd::get_current_graph_task_id() != -1)
    return true;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (is_in_round_ && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  return !is_in_round_;
}

void Reducer::shadow() {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  begin_round(true);
  finish_round();
}

// ---- one round -----------------------------------------------------------------------

void Reducer::begin_round(bool is_shadow) {
  // What waits for the host, or allocates, has no place in a graph. All ranks capture alike, so
  // agreements are put off on all of them.
  const bool captures = is_capturing(device_);
  if (!captures) await_agreements();
  TORCH_CHECK(!captures || (installed_ && !order_), "fastddp: rank ", rank_,
              ": a graph is being captured in one of the first two synchronised backwards of this "
              "model, or the first after one that raised; run it two times before the capture");
  captured_ |= captures;
  if (!installed_) install_plan();
  round_ = std::make_unique<Round>(plan_, params_.size(), is_shadow);
  if (has_streams(device_)) round_->stream = current_stream(device_);
  round_->is_early = schedule_.begin() || !may_launch_late();
  is_in_round_ = true;
}

void Reducer::end_round() {
  round_.reset();
  is_in_round_ = false;
}

void Reducer::await_agreements() {
  const auto take = [this](std::optional<Agreement>& agreement, const char* what) {
    try {
      agreement->work->wait();
    } catch (const std::exception& error) {
      TORCH_CHECK_WITH(DistBackendError, false, "fastddp: rank ", rank_, ": ", what,
                       " failed: ", text_of(error));
    }
    const at::Tensor result = agreement->tensors.front().cpu();
    agreement.reset();
    return result;
  };
  if (order_) {
    const at::Tensor order = take(order_, "the broadcast of the order in which gradients arrive");
    const auto* begin = order.const_data_ptr<std::int64_t>();
    replan({begin, begin + order.numel()});
  }
  if (timing_) {
    const at::Tensor sums = take(timing_, "the all-reduce of the times of rounds");
    const auto* sum = sums.const_data_ptr<double>();
    schedule_.decide(sum[0], sum[1]);
  }
}

void Reducer::queue_end() {
  const auto end = std::make_shared<RoundEnd>(shared_from_this());
  torch::autograd::Engine::get_default_engine().queue_callback([end] { end->reach(); });
  end->open = true;
}

void Reducer::install_plan() {
  stats_.bytes_per_round = 0;
  stats_.num_buckets = static_cast<std::int64_t>(plan_.size());
  for (const Wait& wait : std::exchange(abandoned_, {})) {
    try {
      wait();
    } catch (const std::exception&) {  // of a backward that raised anyway
    }
  }
  drain_current_stream(device_);  // whatever stream the old buckets were used on
  // Frees the old buckets before the new are allocated. A graph goes on to write to its own.
  if (captured_) {
    std::move(buckets_.begin(), buckets_.end(), std::back_inserter(of_graphs_));
    of_graphs_.push_back({.flat = loose_flags_, .wire = {}, .flags = {}, .ones = {}});
    captured_ = false;
  }
  buckets_.clear();
  for (Param& param : params_) {
    param.slot.reset();
    param.place.reset();
  }
  const auto num_dense_flags = static_cast<std::int64_t>(hook_ ? num_dense() : 0);
  const auto num_sparse = static_cast<std::int64_t>(params_.size() - num_dense());
  loose_flags_.reset();
  if (num_dense_flags + num_sparse > 0)
    loose_flags_ = allocate(num_dense_flags + num_sparse, at::kFloat);
  std::int64_t next_flag = 0;
  for (const BucketPlan& bucket_plan : plan_) {
    const Param& first = params_[static_cast<std::size_t>(bucket_plan.slots.front().param)];
    const auto dtype = c10::toRealValueType(first.variable.scalar_type());
    const auto options = first.variable.options().requires_grad(false).dtype(dtype);
    const at::Tensor wire = allocate(bucket_plan.numel, wire_dtype(dtype));
    const at::Tensor flat = wire.scalar_type() == dtype ? wire : at::zeros_like(wire, options);
    stats_.bytes_per_round += static_cast<std::int64_t>(wire.nbytes());
    const auto num_slots = static_cast<std::int64_t>(bucket_plan.slots.size());
    const at::Tensor flags = hook_ ? loose_flags_.narrow(0, next_flag, num_slots)
                                   : wire.narrow(0, bucket_plan.flags_offset, num_slots);
    next_flag += hook_ ? num_slots : 0;
    for (std::int64_t i = 0; i < num_slots; ++i) {
      const SlotPlan& slot = bucket_plan.slots[static_cast<std::size_t>(i)];
      Param& param = params_[static_cast<std::size_t>(slot.param)];
      param.bucket = buckets_.size();
      param.slot = make_slot(param.variable, flat, slot, static_cast<bool>(hook_));
      param.place = make_place(as_real(param.slot), wire, slot);
      param.flag = flags[i];
    }
    const at::Tensor ones = flattens_ && !hook_ ? at::ones({num_slots}, options) : at::Tensor();
    buckets_.push_back({flat, wire, flags, ones});
  }
  for (std::size_t i = num_dense(); i < params_.size(); ++i)
    params_[i].flag = loose_flags_[next_flag++];
  if (has_streams(device_)) home_ = current_stream(device_);
  drain_current_stream(device_);  // other streams may be the first to write to the buckets
  installed_ = true;
}

void Reducer::take(std::size_t index) {
  Param& param = params_[index];
  at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined()) return;
  int& taken = round_->taken[index];
  if (index >= num_dense()) {
    round_->touched_sparse.by_current_after_all(device_);
    const at::Tensor scaled = scale_sparse(grad, scale());
    param.slot = taken++ == 0 ? scaled : param.slot + scaled;
    grad.reset();
    return;
  }
  TORCH_CHECK_TYPE(!grad.is_sparse(), "fastddp: rank ", rank_, ": parameter '", param.name,
                   "' got a sparse gradient, but belongs to no torch.nn.Embedding or EmbeddingBag "
                   "with sparse=True, which is what is looked for when a model is wrapped");
  if (taken == 0) {
    put_by(index, grad);
    round_->arrival.push_back(static_cast<std::int64_t>(index));
  } else {
    TORCH_CHECK(!round_->tracker.launched(param.bucket), "fastddp: rank ", rank_, ": parameter '",
                param.name, "' got gradient number ", taken + 1, " of one backward after ", taken,
                " had been sent, as many as it ever got before. This happens when re-entrant "
                "activation checkpoints begin to share a parameter in the midst of training; use "
                "checkpoint(..., use_reentrant=False)");
    accumulate(index, grad);
  }
  grad.reset();
  if (++taken == param.expected) {
    round_->tracker.mark(param.bucket);
    if (flattens_ && round_->tracker.is_full(param.bucket)) flatten_bucket(param.bucket, {});
  }
  // The first round launches nothing before its end: how many gradients a parameter gets in one
  // backward (re-entrant checkpoints that share it bring several) is only known then. When to
  // launch is this rank's own decision, so it is made by what this rank has seen.
  if (!counts_are_learned_ || !round_->is_early) return;
  for (auto bucket = round_->tracker.pop_full(); bucket != ReadyTracker::kNone;
       bucket = round_->tracker.pop_full()) {
    launch(bucket);
  }
}

// The first gradient of a parameter.
void Reducer::put_by(std::size_t index, at::Tensor grad) {
  const Param& param = params_[index];
  Filling& filling = round_->fillings[param.bucket];
  filling.touched.by_current(device_);
  if (flattens_) {
    filling.pending.push_back({index, std::move(grad), current_stream(device_)});
  } else {
    write(param.place, grad, scale());
  }
}

// A further one, which a re-entrant checkpoint brings. The sum has the bits that it has on the CPU.
void Reducer::accumulate(std::size_t index, const at::Tensor& grad) {
  const Param& param = params_[index];
  Filling& filling = round_->fillings[param.bucket];
  filling.touched.by_current_after_all(device_);
  const auto first = std::find_if(filling.pending.begin(), filling.pending.end(),
                                  [index](const Pending& one) { return one.param == index; });
  if (first != filling.pending.end()) {
    const c10::Stream stream = current_stream(device_);
    if (first->stream != stream) outlive(first->grad, stream);
    write(param.place, first->grad, scale());
    filling.pending.erase(first);
  }
  add(param.place, grad, scale());
}

// Fills in what this rank has no gradient for, then sends the bucket on its way.
void Reducer::launch(std::size_t index, bool waits) {
  const Bucket& bucket = buckets_[index];
  const BucketPlan& plan = plan_[index];
  Filling& filling = round_->fillings[index];
  filling.touched.by_current_after_all(device_);
  if (!filling.is_flattened) {
    std::vector<std::size_t> missing;
    for (std::size_t slot = 0; slot < plan.slots.size(); ++slot) {
      if (round_->taken[static_cast<std::size_t>(plan.slots[slot].param)] == 0)
        missing.push_back(slot);
    }
    if (flattens_) {
      flatten_bucket(index, missing);
    } else {
      fill_missing(index, missing);
    }
  }
  if (!hook_) {
    round_->waits.push_back(start_all_reduce(bucket.wire, waits));
    return;
  }
  std::vector<std::size_t> params;
  std::vector<std::int64_t> offsets;
  for (const SlotPlan& slot : plan.slots) {
    params.push_back(static_cast<std::size_t>(slot.param));
    offsets.push_back(slot.offset);
  }
  const at::Tensor gradients = bucket.flat.narrow(0, 0, plan.flags_offset);
  round_->waits.push_back(start_hook(index, gradients, std::move(params), std::move(offsets)));
}

// One after the other, with the flags.
void Reducer::fill_missing(std::size_t index, const std::vector<std::size_t>& missing) {
  buckets_[index].flags.fill_(1);
  for (const std::size_t slot : missing) {
    const auto param = static_cast<std::size_t>(plan_[index].slots[slot].param);
    const Leftover leftover = take_leftover(param);
    if (leftover.grad.defined()) {
      write(params_[param].place, leftover.grad, scale());
    } else {
      params_[param].place.zero_();
    }
    if (!leftover.counts) params_[param].flag.zero_();
  }
}

// What was put by, what is missing, and the flags: in one pass.
void Reducer::flatten_bucket(std::size_t index, const std::vector<std::size_t>& missing) {
  const Bucket& bucket = buckets_[index];
  const BucketPlan& plan = plan_[index];
  Filling& filling = round_->fillings[index];
  filling.touched.by_current_after_all(device_);
  std::vector<FlatPiece> pieces;
  pieces.reserve(filling.pending.size() + missing.size() + 1);
  for (const Pending& one : filling.pending) {
    if (one.stream != current_stream(device_)) outlive(one.grad, current_stream(device_));
    add_piece(pieces, index, one.param, one.grad);
  }
  std::vector<std::size_t> uncounted;
  for (const std::size_t slot : missing) {
    const auto param = static_cast<std::size_t>(plan.slots[slot].param);
    const Leftover leftover = take_leftover(param);
    // Whatever stream it is from.
    if (leftover.grad.defined() && has_streams(device_))
      outlive(leftover.grad, current_stream(device_));
    add_piece(pieces, index, param, leftover.grad);
    if (!leftover.counts) uncounted.push_back(slot);
  }
  if (hook_) {
    bucket.flags.fill_(1);
    for (const std::size_t slot : uncounted) bucket.flags[static_cast<std::int64_t>(slot)].zero_();
  } else {  // in runs of ones between zeros
    std::int64_t begin = 0;
    const auto add_ones = [&](std::int64_t end) {
      if (end > begin)
        pieces.push_back(
            {bucket.ones.narrow(0, begin, end - begin), plan.flags_offset + begin, end - begin});
    };
    for (const std::size_t slot : uncounted) {
      const auto at = static_cast<std::int64_t>(slot);
      add_ones(at);
      pieces.push_back({{}, plan.flags_offset + at, 1});
      begin = at + 1;
    }
    add_ones(static_cast<std::int64_t>(plan.slots.size()));
  }
  flatten(bucket.wire, pieces, bucket.flat.scalar_type(), scale());
  filling.pending.clear();
  filling.is_flattened = true;
}

// A gradient that does not lie as its place does goes there by itself. Autograd makes none such.
void Reducer::add_piece(std::vector<FlatPiece>& pieces,
                        std::size_t bucket,
                        std::size_t index,
                        const at::Tensor& lazy_grad) const {
  const Param& param = params_[index];
  const at::Tensor& place = param.place;
  const auto offset = place.storage_offset();
  if (!lazy_grad.defined()) {
    pieces.push_back({{}, offset, place.numel()});
    return;
  }
  at::Tensor grad = as_real(resolved(lazy_grad));
  const bool is_moved = grad.is_alias_of(buckets_[bucket].flat) &&
                        grad.const_data_ptr() != param.slot.const_data_ptr();
  if (is_moved) grad = grad.clone();  // the pass may have written over it by then
  if (lies_like(place, grad) && grad.scalar_type() == buckets_[bucket].flat.scalar_type()) {
    pieces.push_back({grad, offset, grad.numel()});
  } else {
    write(place, grad, scale());
  }
}

void Reducer::launch_sparse(std::size_t index) {
  Param& param = params_[index];
  round_->touched_sparse.by_current_after_all(device_);
  param.flag.fill_(1);
  if (round_->taken[index] == 0) {
    const Leftover leftover = take_leftover(index);
    param.slot = leftover.grad.defined() ? scale_sparse(leftover.grad, scale())
                                         : empty_sparse(param.variable);
    if (!leftover.counts) param.flag.zero_();
  }
  const std::size_t nth = plan_.size() + index - num_dense();
  round_->waits.push_back(hook_ ? start_hook(nth, param.slot, {index}, {0})
                                : start_all_reduce(param.slot));
}

void Reducer::launch_loose_flags() {
  if (!loose_flags_.defined()) return;
  for (Filling& filling : round_->fillings) filling.touched.by_current_after_all(device_);
  round_->waits.push_back(start_all_reduce(loose_flags_));
}

// What this rank has, which did not come from the round's backward.
Reducer::Leftover Reducer::take_leftover(std::size_t index) {
  Param& param = params_[index];
  at::Tensor grad = std::move(param.variable.mutable_grad());
  at::Tensor old = grad;
  // What unsynchronised backwards left counts as this one's.
  const bool accumulated = !round_->is_shadow && is_accumulated(param, grad);
  const bool is_dense = index < num_dense();
  if (is_dense && grad.defined() && grad.is_sparse()) grad = grad.to_dense();
  // The reduction overwrites the slot. If no rank has a new gradient the old must come back bit for
  // bit.
  if (is_dense && grad.defined() && !accumulated && grad.is_alias_of(param.slot))
    old = grad.clone();
  if (round_->is_shadow) grad.reset();
  if (!accumulated) round_->bystanders.push_back({index, std::move(old)});
  return {std::move(grad), accumulated};
}

bool Reducer::is_accumulated(const Param& param, const at::Tensor& grad) {
  const auto left = param.accumulated.lock();
  return left.defined() && left.get() == grad.unsafeGetTensorImpl();
}

Wait Reducer::start_all_reduce(at::Tensor tensor, bool waits) const {
  std::vector<at::Tensor> tensors{std::move(tensor)};
  c10d::AllreduceOptions options;
  options.asyncOp = !waits;
  const WithoutPythonObjects guard;
  try {
    return [work = group()->allreduce(tensors, options)] { work->wait(); };
  } catch (const c10::DistBackendError&) {  // it has been waited for already
    return [error = std::current_exception()] { std::rethrow_exception(error); };
  }
}

Wait Reducer::start_hook(std::size_t index,
                         const at::Tensor& buffer,
                         std::vector<std::size_t> params,
                         std::vector<std::int64_t> offsets) const {
  const std::size_t count = plan_.size() + params_.size() - num_dense();
  return hook_({index, count, buffer, std::move(params), std::move(offsets)});
}

// `waits`: whether the caller goes on to wait for all of it.
void Reducer::flush(bool waits) {
  for (auto bucket = round_->tracker.pop(); bucket != ReadyTracker::kNone;
       bucket = round_->tracker.pop()) {
    launch(bucket, waits && may_launch_late());
  }
  for (std::size_t i = num_dense(); i < params_.size(); ++i) launch_sparse(i);
  if (hook_) {  // its callbacks may communicate; see HookRunner in fastddp/hooks.py
    for (const Wait& wait : round_->waits) wait();
    round_->waits.clear();
  }
  launch_loose_flags();
  if (!order_is_learned_) agree_on_order();
  if (may_launch_late() && schedule_.is_due()) agree_on_schedule();
}

// Starts to send rank 0's arrival order to all; the next round, on every rank, begins with the plan
// made from it.
void Reducer::agree_on_order() {
  std::vector<std::int64_t> order = round_->arrival;
  for (const BucketPlan& bucket : plan_) {
    for (const SlotPlan& slot : bucket.slots) {
      if (round_->taken[static_cast<std::size_t>(slot.param)] == 0) order.push_back(slot.param);
    }
  }
  Agreement agreement;
  agreement.tensors = {at::tensor(order, at::kLong).to(device_)};
  const WithoutPythonObjects guard;
  agreement.work = group()->broadcast(agreement.tensors);
  order_ = std::move(agreement);
  order_is_learned_ = true;
}

void Reducer::agree_on_schedule() {
  Agreement agreement;
  agreement.tensors = {at::tensor({schedule_.early_us(), schedule_.late_us()}, at::kDouble)};
  const WithoutPythonObjects guard;
  agreement.work = group()->allreduce(agreement.tensors);
  timing_ = std::move(agreement);
}

void Reducer::wait_for(std::size_t launch) {
  try {
    round_->waits[launch]();
  } catch (const std::exception& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "fastddp: rank ", rank_, ": the all-reduce of ",
                     describe(launch), " failed: ", text_of(error));
  }
}

// Brings what was reduced in another dtype to where gradients are.
void Reducer::cast_back(std::size_t launch) {
  if (hook_ || launch >= buckets_.size()) return;
  const Bucket& bucket = buckets_[launch];
  if (!bucket.wire.is_same(bucket.flat)) {
    at::Tensor flat = bucket.flat;
    flat.copy_(bucket.wire);
  }
}

void Reducer::hand_out() {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    Param& param = params_[i];
    param.accumulated.reset();
    param.expected = std::max(param.expected, round_->taken[i]);
    param.variable.mutable_grad() = param.slot;
  }
  counts_are_learned_ |= !round_->is_shadow;
  read_flags();
  for (Bystander& bystander : round_->bystanders) {
    Param& param = params_[bystander.param];
    if (param.used) continue;
    param.variable.mutable_grad() = std::move(bystander.grad);
    if (stats_.rounds == 0) unused_.push_back(param.name);
  }
  if (home_ && current_stream(device_) != *home_) {  // `.grad` is going to be used here
    for (const Bucket& bucket : buckets_) {
      outlive(bucket.flat, current_stream(device_));
      outlive(bucket.wire, current_stream(device_));
    }
  }
}

// Of the bystanders, whether any rank had a gradient. From a GPU they are read all at once; this is
// where the host waits, on a rank that has bystanders. A graph cannot: it goes by what was read
// last.
void Reducer::read_flags() {
  if (round_->bystanders.empty() || is_capturing(device_)) return;
  if (device_.is_cpu()) {
    for (const Bystander& bystander : round_->bystanders) {
      Param& param = params_[bystander.param];
      param.used = param.flag.item<double>() != 0;
    }
    return;
  }
  std::vector<at::Tensor> flags;
  for (const Bystander& bystander : round_->bystanders)
    flags.push_back(params_[bystander.param].flag);
  const at::Tensor all = at::stack(flags).to(at::kCPU, at::kDouble);
  const auto* flag = all.const_data_ptr<double>();
  for (const Bystander& bystander : round_->bystanders)
    params_[bystander.param].used = *flag++ != 0;
}

// ---- memory and names ----------------------------------------------------------------

void Reducer::replan(const std::vector<std::int64_t>& order) {
  const auto align_bytes = hook_ ? kPackedAlignBytes : slot_align_bytes(comm_dtype_.has_value());
  auto plan = plan_buckets(specs_, order, caps_bytes_, align_bytes);
  schedule_ = Schedule();  // here, where all ranks are in the same round
  if (plan == plan_) return;
  plan_ = std::move(plan);
  installed_ = false;
}

// Zeroed, so that the padding between slots sums to zero for ever.
at::Tensor Reducer::allocate(std::int64_t numel, at::ScalarType dtype) const {
  const auto options = at::TensorOptions().dtype(dtype).device(device_);
  const auto owner = group();
  try {
    const auto backend = owner->getBackend(device_.type());
    if (backend->supportsTensorAlloc(device_.index()))
      return backend->allocateTensor(numel, options).zero_();
  } catch (const c10::Error&) {  // not ready for it, as NCCL before its first collective
  }
  return at::zeros({numel}, options);
}

at::ScalarType Reducer::wire_dtype(at::ScalarType dtype) const {
  return hook_ || dtype == at::kDouble ? dtype : comm_dtype_.value_or(dtype);
}

c10::intrusive_ptr<c10d::ProcessGroup> Reducer::group() const {
  auto group = group_.lock();
  TORCH_CHECK(group, "fastddp: rank ", rank_,
              ": the process group of this model was destroyed before its backward; call "
              "destroy_process_group() after the last step");
  return group;
}

std::string Reducer::describe(std::size_t launch) const {
  if (hook_) return "the flags of used parameters";
  if (launch >= plan_.size()) {
    const std::size_t param = num_dense() + launch - plan_.size();
    return param < params_.size() ? "the sparse gradient of '" + params_[param].name + "'"
                                  : "the flags of used parameters";
  }
  const auto& slots = plan_[launch].slots;
  const auto name = [this](const SlotPlan& slot) {
    return params_[static_cast<std::size_t>(slot.param)].name;
  };
  std::string text = "bucket " + std::to_string(launch + 1) + " of " +
                     std::to_string(plan_.size()) + " ('" + name(slots.front()) + "'";
  if (slots.size() > 1) text += " to '" + name(slots.back()) + "'";
  return text + ")";
}

}  // namespace fastddp
