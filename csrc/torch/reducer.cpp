#include "torch/reducer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ScalarOps.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <numeric>

#include "kernels/flatten.h"
#include "torch/dtype.h"

namespace fastddp {
namespace {

// Above this many elements torch's own kernel is used where it may run on several threads; the bits
// are the same.
constexpr std::int64_t kParallelNumel = 1 << 15;

at::Tensor as_real(const at::Tensor& tensor) {
  return tensor.is_complex() ? at::view_as_real(tensor) : tensor;
}

// The gradient with its values in memory: a lazy conjugation or negation is only a bit on the
// tensor.
at::Tensor resolved(const at::Tensor& grad) {
  return grad.is_conj() || grad.is_neg() ? grad.resolve_conj().resolve_neg() : grad;
}

// Whether the two hold their elements in the same places, so that one flat loop runs over both.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

bool runs_flat(const at::Tensor& slot, const at::Tensor& grad) {
  return slot.is_cpu() && grad.is_cpu() && same_layout(slot, grad) &&
         slot.is_non_overlapping_and_dense() &&
         (grad.numel() < kParallelNumel || at::get_num_threads() == 1);
}

std::size_t real_numel(const at::Tensor& tensor) {
  return static_cast<std::size_t>(tensor.numel()) * (tensor.is_complex() ? 2 : 1);
}

void write(DType dtype, const at::Tensor& slot, const at::Tensor& lazy_grad, double scale) {
  const at::Tensor grad = resolved(lazy_grad);
  if (runs_flat(slot, grad)) {
    scale_copy(dtype, slot.data_ptr(), grad.const_data_ptr(), real_numel(grad), scale);
  } else {
    auto out = as_real(slot);
    at::mul_out(out, as_real(grad), at::native::wrapped_scalar_tensor(scale));
  }
}

void add(DType dtype, const at::Tensor& slot, const at::Tensor& lazy_grad, double scale) {
  const at::Tensor grad = resolved(lazy_grad);
  if (runs_flat(slot, grad)) {
    scale_add(dtype, slot.data_ptr(), grad.const_data_ptr(), real_numel(grad), scale);
  } else {
    as_real(slot).add_(as_real(grad).mul(scale));
  }
}

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
      const torch::autograd::variable_list& /*inputs*/) override {
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
                 const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                 std::vector<std::int64_t> caps_bytes)
    : group_(group),
      rank_(group->getRank()),
      scale_(1.0 / group->getSize()),
      caps_bytes_(std::move(caps_bytes)) {
  TORCH_CHECK_VALUE(params.size() == names.size(), "fastddp: ", params.size(), " parameters but ",
                    names.size(), " names");
  for (std::size_t i = 0; i < params.size(); ++i) {
    const auto known = dtype_of(params[i].scalar_type());
    TORCH_CHECK_TYPE(known, "fastddp: parameter '", names[i], "' has dtype ",
                     params[i].scalar_type(),
                     "; gradients can be float32, float64, float16, bfloat16 or complex");
    const DType dtype = *known;
    specs_.push_back({static_cast<std::int64_t>(real_numel(params[i])),
                      static_cast<std::int64_t>(size_of(dtype)), static_cast<std::int64_t>(dtype)});
    params_.push_back(
        {.variable = std::move(params[i]), .name = std::move(names[i]), .dtype = dtype});
  }
  // Until the arrival order is known: gradients come back roughly in the reverse of the order of
  // registration.
  std::vector<std::int64_t> order(params_.size());
  std::iota(order.rbegin(), order.rend(), 0);
  plan_ = plan_buckets(specs_, order, caps_bytes_);
}

void Reducer::attach() {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    params_[i].accumulator = torch::autograd::impl::grad_accumulator(params_[i].variable);
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

void Reducer::close() {
  const std::lock_guard lock(mutex_);
  for (Param& param : params_) {
    if (param.accumulator) param.accumulator->del_post_hook(param.hook);
    param.accumulator.reset();
  }
}

Stats Reducer::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<BucketPlan> Reducer::plan() const {
  const std::lock_guard lock(mutex_);
  return plan_;
}

// ---- called by autograd --------------------------------------------------------------

void Reducer::on_backward() {
  // Not empty for autograd.grad() and backward(inputs=...), which need not involve the other ranks.
  if (!torch::autograd::get_current_graph_task_exec_info()->empty()) return;
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  const auto trains = [](const Param& param) { return param.variable.requires_grad(); };
  if (round_ || !sync_ || std::none_of(params_.begin(), params_.end(), trains)) return;
  begin_round();
}

void Reducer::on_gradient(std::size_t param) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  if (!round_) {
    if (!sync_) {
      params_[param].accumulated = true;
      return;
    }
    begin_round();
  }
  take(param);
}

void Reducer::finish_round() {
  const std::lock_guard lock(mutex_);
  if (!round_) return;
  const c10::NoGradGuard no_grad;
  try {
    flush();
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t bucket = 0; bucket < buckets_.size(); ++bucket) wait_for(bucket);
    stats_.wait_us_last = us_since(start);
  } catch (...) {
    round_.reset();
    buckets_.clear();  // a collective may still write to them
    throw;
  }
  hand_out();
  stats_.wait_us_total += stats_.wait_us_last;
  ++stats_.rounds;
  round_.reset();
}

void Reducer::abandon_round() noexcept {
  const std::lock_guard lock(mutex_);
  if (!round_) return;
  const c10::NoGradGuard no_grad;
  try {
    flush();
  } catch (...) {  // the backward's own exception is on its way to the user and says more
  }
  round_.reset();
  buckets_.clear();  // collectives still write to them; the next round gets its own
}

// ---- one round -----------------------------------------------------------------------

void Reducer::begin_round() {
  if (agreement_) {
    agreement_->work->wait();
    const at::Tensor order = agreement_->order.front().cpu();
    const auto* begin = order.const_data_ptr<std::int64_t>();
    agreement_.reset();
    auto plan = plan_buckets(specs_, {begin, begin + order.numel()}, caps_bytes_);
    if (plan != plan_) {
      plan_ = std::move(plan);
      buckets_.clear();
    }
  }
  if (buckets_.empty()) install_plan();
  round_ = std::make_unique<Round>(plan_, params_.size());
  const auto end = std::make_shared<RoundEnd>(shared_from_this());
  torch::autograd::Engine::get_default_engine().queue_callback([end] { end->reach(); });
  end->open = true;
}

void Reducer::install_plan() {
  stats_.bytes_per_round = 0;
  stats_.num_buckets = static_cast<std::int64_t>(plan_.size());
  // Frees the old buckets before the new are allocated.
  for (Param& param : params_) param.slot.reset();
  for (const BucketPlan& bucket_plan : plan_) {
    const Param& first = params_[static_cast<std::size_t>(bucket_plan.slots.front().param)];
    const at::Tensor flat =
        allocate(bucket_plan.numel, c10::toRealValueType(first.variable.scalar_type()));
    stats_.bytes_per_round += static_cast<std::int64_t>(flat.nbytes());
    for (const SlotPlan& slot : bucket_plan.slots) {
      Param& param = params_[static_cast<std::size_t>(slot.param)];
      param.bucket = buckets_.size();
      param.slot = make_slot(param, flat, slot);
    }
    const auto num_slots = static_cast<std::int64_t>(bucket_plan.slots.size());
    buckets_.push_back({flat, flat.narrow(0, bucket_plan.flags_offset, num_slots)});
  }
}

void Reducer::take(std::size_t index) {
  Param& param = params_[index];
  at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined()) return;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !grad.is_sparse(), "fastddp: parameter '", param.name,
      "' has a sparse gradient, which is not supported yet; use sparse=False");
  int& taken = round_->taken[index];
  if (taken == 0) {
    write(param.dtype, param.slot, grad, scale_);
    round_->arrival.push_back(static_cast<std::int64_t>(index));
  } else {
    TORCH_CHECK(!round_->tracker.launched(param.bucket), "fastddp: rank ", rank_, ": parameter '",
                param.name, "' got gradient number ", taken + 1, " of one backward after ", taken,
                " had been sent, as many as it ever got before. This happens when re-entrant "
                "activation checkpoints begin to share a parameter in the midst of training; use "
                "checkpoint(..., use_reentrant=False)");
    add(param.dtype, param.slot, grad, scale_);
  }
  if (++taken == param.expected) round_->tracker.mark(param.bucket);
  grad.reset();
  // The first round launches nothing before its end: how many gradients a parameter gets in one
  // backward (re-entrant checkpoints that share it bring several) is only known then.
  if (!order_is_learned_) return;
  for (auto bucket = round_->tracker.pop_full(); bucket != ReadyTracker::kNone;
       bucket = round_->tracker.pop_full()) {
    launch(bucket);
  }
}

// Fills in what this rank has no gradient for, then sends the bucket on its way.
void Reducer::launch(std::size_t index) {
  Bucket& bucket = buckets_[index];
  const auto& slots = plan_[index].slots;
  bucket.flags.fill_(1);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const auto param = static_cast<std::size_t>(slots[i].param);
    if (round_->taken[param] == 0) add_bystander(param, bucket.flags[static_cast<std::int64_t>(i)]);
  }
  std::vector<at::Tensor> tensors{bucket.flat};
  const WithoutPythonObjects guard;
  round_->works.push_back(group()->allreduce(tensors));
}

void Reducer::add_bystander(std::size_t index, const at::Tensor& flag) {
  Param& param = params_[index];
  at::Tensor grad = std::move(param.variable.mutable_grad());
  if (!grad.defined()) {
    param.slot.zero_();
  } else if (param.accumulated) {  // what unsynchronised backwards left counts as this one's
    write(param.dtype, param.slot, grad, scale_);
    return;
  } else {
    // The reduction overwrites the slot. If no rank has a new gradient the old must come back bit
    // for bit.
    const at::Tensor old = grad.is_alias_of(param.slot) ? grad.clone() : grad;
    write(param.dtype, param.slot, grad, scale_);
    grad = old;
  }
  flag.zero_();
  round_->bystanders.push_back({index, std::move(grad), flag});
}

void Reducer::flush() {
  for (auto bucket = round_->tracker.pop(); bucket != ReadyTracker::kNone;
       bucket = round_->tracker.pop()) {
    launch(bucket);
  }
  if (!order_is_learned_) agree_on_order();
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
  agreement.order = {at::tensor(order, at::kLong).to(params_.front().variable.device())};
  const WithoutPythonObjects guard;
  agreement.work = group()->broadcast(agreement.order);
  agreement_ = std::move(agreement);
  order_is_learned_ = true;
}

void Reducer::wait_for(std::size_t bucket) {
  try {
    round_->works[bucket]->wait();
  } catch (const std::exception& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "fastddp: rank ", rank_, ": the all-reduce of ",
                     describe(bucket), " failed: ", error.what());
  }
}

void Reducer::hand_out() {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    Param& param = params_[i];
    param.accumulated = false;
    param.expected = std::max(param.expected, round_->taken[i]);
    param.variable.mutable_grad() = param.slot;
  }
  for (Bystander& bystander : round_->bystanders) {
    // Reading a flag from a device waits for it, which only a rank without a gradient for this
    // parameter does.
    const bool used_elsewhere = bystander.flag.item<double>() != 0;
    if (!used_elsewhere)
      params_[bystander.param].variable.mutable_grad() = std::move(bystander.grad);
  }
}

// ---- memory and names ----------------------------------------------------------------

// Zeroed, so that the padding between slots sums to zero for ever.
at::Tensor Reducer::allocate(std::int64_t numel, at::ScalarType dtype) const {
  const at::Device device = params_.front().variable.device();
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const auto backend = group()->getBackend(device.type());
  if (backend->supportsTensorAlloc(device.index()))
    return backend->allocateTensor(numel, options).zero_();
  return at::zeros({numel}, options);
}

// Shares the bucket's storage but is not a view to autograd, so `grad.detach_()` and the like work
// on it.
at::Tensor Reducer::make_slot(const Param& param,
                              const at::Tensor& flat,
                              const SlotPlan& slot) const {
  const at::Tensor& variable = param.variable;
  const auto sizes = variable.sizes();
  at::Tensor result = at::empty({0}, variable.options().requires_grad(false));
  const auto contiguous = at::detail::defaultStrides(sizes);
  const auto strides =
      variable.is_non_overlapping_and_dense() ? variable.strides() : at::IntArrayRef(contiguous);
  const std::int64_t offset = variable.is_complex() ? slot.offset / 2 : slot.offset;
  at::AutoDispatchBelowADInplaceOrView guard;
  result.set_(flat.storage(), offset, sizes, strides);
  return result;
}

c10::intrusive_ptr<c10d::ProcessGroup> Reducer::group() const {
  auto group = group_.lock();
  TORCH_CHECK(group, "fastddp: rank ", rank_,
              ": the process group of this model was destroyed before its backward; call "
              "destroy_process_group() after the last step");
  return group;
}

std::string Reducer::describe(std::size_t bucket) const {
  const auto& slots = plan_[bucket].slots;
  const auto name = [this](const SlotPlan& slot) {
    return params_[static_cast<std::size_t>(slot.param)].name;
  };
  std::string text = "bucket " + std::to_string(bucket + 1) + " of " +
                     std::to_string(plan_.size()) + " ('" + name(slots.front()) + "'";
  if (slots.size() > 1) text += " to '" + name(slots.back()) + "'";
  return text + ")";
}

}  // namespace fastddp
