#include "reducer/reducer.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <iterator>
#include <map>
#include <numeric>
#include <thread>

#include "shm/heap.h"
#include "shm/label.h"
#include "tensor/dtype.h"
#include "tensor/error_text.h"
#include "tensor/flatten.h"
#include "tensor/slot.h"
#include "tensor/streams.h"

namespace fastddp {
namespace {

// In profiles.
constexpr const char* kFillBucket = "fastddp.reducer::fill_bucket";

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

at::Tensor empty_sparse(const Layout& like) {
  at::DimVector values_shape = like.sizes;
  values_shape.front() = 0;
  return at::sparse_coo_tensor(at::empty({1, 0}, like.options.dtype(at::kLong)),
                               at::empty(values_shape, like.options), like.sizes);
}

// The order of launching in a group, shared by the reducers on it.
std::shared_ptr<LaunchOrder> order_of(const c10d::ProcessGroup& group) {
  static std::mutex mutex;
  static std::map<const c10d::ProcessGroup*, std::weak_ptr<LaunchOrder>> orders;
  const std::lock_guard lock(mutex);
  std::erase_if(orders, [](const auto& one) { return one.second.expired(); });
  std::shared_ptr<LaunchOrder> order = orders[&group].lock();
  if (!order) orders[&group] = order = std::make_shared<LaunchOrder>();
  return order;
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

std::int64_t ns_of(std::chrono::system_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

// How many parameters ahead a walk asks for what has left the caches since the last step.
constexpr std::size_t kAhead = 8;

double us_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

// Has the report say what an entry throws.
template <typename Entry>
void Reducer::noting_errors(Entry entry) {
  try {
    entry();
  } catch (const std::exception& error) {
    std::string text = text_of(error);  // may take the GIL
    const std::lock_guard lock(report_mutex_);
    report_.error = std::move(text);
    throw;
  }
}

struct GradientHook final : torch::autograd::FunctionPostHook {
  GradientHook(std::weak_ptr<Reducer> owner, std::size_t param)
      : reducer(std::move(owner)), index(param) {}

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& outputs,
      const torch::autograd::variable_list& gradients) override {
    // A node runs without a gradient too, when a custom backward returns none.
    if (!gradients.front().defined()) return outputs;
    if (const auto alive = reducer.lock()) alive->noting_errors([&] { alive->on_gradient(index); });
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
    reducer->noting_errors([this] { reducer->end_backward(); });
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
                 std::optional<bool> flattens,
                 bool lazy,
                 Owner owner)
    : group_(group),
      rank_(group->getRank()),
      size_(group->getSize()),
      caps_bytes_(std::move(caps_bytes)),
      frozen_(std::move(frozen)),
      device_(params.empty() ? c10::Device(c10::kCPU) : params.front().device()),
      comm_dtype_(comm_dtype),
      flattens_(flattens.value_or(!device_.is_cpu())),
      lazy_(lazy),
      runs_inline_(runs_inline(*group, params)),
      owner_(std::move(owner)),
      order_in_group_(order_of(*group)),
      divisor_(group->getSize()) {
  TORCH_CHECK_VALUE(params.size() == names.size() && num_sparse <= params.size(),
                    "fastddp: ", params.size(), " parameters, ", num_sparse,
                    " of them sparse, but ", names.size(), " names");
  order_in_group_->introduce(owner_.number, owner_.title);
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
    const Layout layout(params[i]);
    params_.push_back(
        {.variable = std::move(params[i]), .name = std::move(names[i]), .layout = layout});
  }
  // Until the arrival order is known: gradients come back roughly in the reverse of the order of
  // registration.
  std::vector<std::int64_t> order(num_dense);
  std::iota(order.rbegin(), order.rend(), 0);
  replan(order);
}

Reducer::~Reducer() { order_in_group_->end(this); }

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
      if (const auto alive = reducer.lock()) alive->noting_errors([&] { alive->on_backward(); });
    });
  }
}

void Reducer::set_divisor(double divisor) {
  const std::lock_guard lock(mutex_);
  divisor_ = divisor;
}

void Reducer::set_hook(Hook hook, std::function<void()> let_go) {
  const std::lock_guard lock(mutex_);
  hook_ = std::move(hook);
  let_go_ = std::move(let_go);
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

void Reducer::set_on_news(std::function<void(News)> callback) {
  const std::lock_guard lock(mutex_);
  on_news_ = std::move(callback);
}

bool Reducer::is_stale() {
  const std::lock_guard lock(mutex_);
  is_checked_ = true;
  if (closed_) return false;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    if (i + kAhead < params_.size()) prefetch(params_[i + kAhead].variable);
    if (has_become_another(params_[i])) return true;
  }
  return false;
}

// Autograd makes another node where the parameter gets other memory by `set_`, or another dtype by
// `.data =`. The node is compared without taking hold of it: this runs for every parameter in every
// forward.
bool Reducer::has_become_another(const Param& param) {
  if (!param.accumulator || !param.layout.is_that_of(param.variable)) return true;
  const auto* const meta = torch::autograd::impl::get_autograd_meta(param.variable);
  if (!meta) return true;
  const auto& node = meta->grad_accumulator_;
  if constexpr (requires { node._unsafe_get_target(); }) {
    return node._unsafe_get_target() != param.accumulator.get();
  } else {
    return node.lock() != param.accumulator;
  }
}

void Reducer::retire() {
  const std::lock_guard lock(mutex_);
  for (Param& param : params_) {  // the others' gradients go on to begin rounds
    if (has_become_another(param)) unhook(param);
  }
  announce_change();
}

void Reducer::announce_change() {
  retired_ = true;
  const c10::NoGradGuard no_grad;
  for (const Bucket& bucket : buckets_) {
    if (bucket.sent_marks.defined()) bucket.sent_marks[0].fill_(1);
  }
  if (loose_) loose_->sent_marks[0].fill_(1);
}

void Reducer::close() {
  const std::lock_guard lock(mutex_);
  for (Param& param : params_) unhook(param);
  after_round_ = nullptr;
  closed_ = true;
}

// So that a parameter that has become another gets a node that fits.
void Reducer::unhook(Param& param) {
  if (param.accumulator) param.accumulator->del_post_hook(param.hook);
  param.accumulator.reset();
}

Stats Reducer::stats() const {
  const std::lock_guard lock(report_mutex_);
  return report_.stats;
}

std::vector<BucketPlan> Reducer::plan() const {
  const std::lock_guard lock(report_mutex_);
  return report_.plan;
}

std::vector<std::string> Reducer::unused() const {
  const std::lock_guard lock(report_mutex_);
  return report_.unused;
}

std::string Reducer::error() const {
  const std::lock_guard lock(report_mutex_);
  return report_.error;
}

std::vector<std::int64_t> Reducer::used_by() const {
  TORCH_CHECK(phase_ != Phase::kFilling && phase_ != Phase::kInFlight, "fastddp: rank ", rank_,
              ": which parameters were used is known when the backward that is under way is over, "
              "and finalized");
  const std::lock_guard lock(mutex_);
  if (params_.empty()) return {};
  if (stats_.rounds == 0 || !installed_) return std::vector<std::int64_t>(params_.size(), size_);
  const double one = flattens_ ? scale() : 1;  // the pass over a bucket scales its flags too
  std::vector<std::int64_t> used(params_.size());
  for (std::size_t i = 0; i < plan_.size(); ++i) {
    const at::Tensor flags = buckets_[i].flags.to(at::kCPU, at::kDouble);
    const auto* flag = flags.const_data_ptr<double>();
    for (const SlotPlan& slot : plan_[i].slots)
      used[static_cast<std::size_t>(slot.param)] = std::llround(*flag++ / one);
  }
  for (std::size_t i = num_dense(); i < params_.size(); ++i)
    used[i] = static_cast<std::int64_t>(params_[i].flag.item<double>());
  return used;
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
  const Phase phase = phase_;
  if (closed_ || phase == Phase::kFilling) return;
  if (phase != Phase::kBetween)
    refuse_backward("backward has reached an output of " + owner_.title);
  if (!sync_) return;
  if (!retired_ && std::none_of(params_.begin(), params_.end(), trains)) return;
  begin_round(Gives::kBackward);
  queue_end();
}

void Reducer::on_gradient(std::size_t param) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  if (phase_ != Phase::kFilling) {
    if (phase_ != Phase::kBetween)
      refuse_backward("parameter '" + params_[param].name + "' got a gradient");
    if (!sync_) {
      params_[param].accumulated = params_[param].variable.grad().getIntrusivePtr();
      return;
    }
    begin_round(Gives::kBackward);
    queue_end();
  }
  if (!retired_) take(param);
}

void Reducer::refuse_backward(const std::string& what) const {
  TORCH_CHECK(phase_ != Phase::kInFlight, "fastddp: rank ", rank_, ": ", what,
              " while the gradients of the backward before are in flight; call "
              "finalize_backward() before the next backward");
  TORCH_CHECK(false, "fastddp: rank ", rank_, ": ", what,
              " after finalize_backward() was called in the same backward; call it from where all "
              "of the model's gradients are there, or after backward");
}

void Reducer::end_backward() {
  const std::lock_guard lock(mutex_);
  if (phase_ == Phase::kFinalized) {
    // What came after the hook that finalized has autograd's caller wait for its stream.
    phase_ = Phase::kBetween;
  } else if (!round_) {
    return;
  } else if (round_->is_manual) {
    leave_in_flight();
  } else {
    finish_round();
  }
}

void Reducer::leave_in_flight() {
  const c10::NoGradGuard no_grad;
  try {
    launch_rest(false);
  } catch (...) {
    drop_round();
    throw;
  }
  phase_ = Phase::kInFlight;
}

void Reducer::launch_rest(bool waits) {
  stats_.backward_us_last = us_since(round_->begin);
  flush(waits);
}

void Reducer::finalize() {
  noting_errors([this] { finalize_round(); });
}

void Reducer::finalize_round() {
  const std::lock_guard lock(mutex_);
  TORCH_CHECK(round_ && round_->is_manual, "fastddp: rank ", rank_,
              ": finalize_backward(), but no gradients are in flight; call it once for each "
              "synchronised backward that began with require_manual_backward_finalization = True");
  TORCH_CHECK(round_->is_captured == is_capturing(device_), "fastddp: rank ", rank_,
              ": finalize_backward() has to be captured into the graph that its backward was "
              "captured into; call it within the same capture");
  if (phase_ == Phase::kInFlight) {
    check_params();
    finish_round();
    return;
  }
  TORCH_CHECK(is_all_launched() || order_in_group_->may_launch(this), "fastddp: rank ", rank_,
              ": finalize_backward() of ", owner_.title,
              " in the middle of a backward that reached another model on the same group before (",
              order_in_group_->others(owner_.number),
              "), which still has gradients to send; finalize that one first, or call this when "
              "backward is over");
  finish_round(Phase::kFinalized);
}

// Whether parameters still have the layouts that the gradients in flight have.
void Reducer::check_params() {
  if (retired_) return;
  for (const Param& param : params_) {
    const Layout& layout = param.layout;
    if (layout.is_that_of(param.variable)) continue;
    drop_round();
    TORCH_CHECK(false, "fastddp: rank ", rank_, ": parameter '", param.name, "' had shape ",
                at::IntArrayRef(layout.sizes), " and dtype ",
                c10::typeMetaToScalarType(layout.options.dtype()), " in backward, and has ",
                param.variable.sizes(), " and ", param.variable.scalar_type(),
                " now that its gradient is to be written; call finalize_backward() before the "
                "model is changed. This backward's gradients are dropped");
  }
}

void Reducer::finish_round(Phase then) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  bool has_changed = false;
  try {
    RECORD_FUNCTION("fastddp.reducer::finish_round", {});
    const auto start = std::chrono::steady_clock::now();
    if (phase_ == Phase::kFilling) launch_rest(true);
    for (std::size_t launch = 0; launch < round_->waits.size(); ++launch) {
      wait_for(launch);
      cast_back(launch);
    }
    stats_.wait_us_last = us_since(start);
    stats_.comm_us_last = round_->launched ? us_since(*round_->launched) : 0;
    has_changed = read_marks();
    hand_out();
    if (lazy_) leave_buckets();
  } catch (...) {
    drop_round(then);
    throw;
  }
  stats_.wait_us_total += stats_.wait_us_last;
  ++stats_.rounds;
  stats_.overlaps = round_->is_early;
  stats_.began_ns = ns_of(round_->began);
  note_unused();
  if (round_->gives != Gives::kNothing) schedule_.add(round_->is_early, us_since(round_->begin));
  const bool was_empty = is_empty();
  const auto error = round_->error;
  end_round(then);
  const auto on_news = on_news_;
  if (on_news && (has_changed || was_empty)) on_news(has_changed ? News::kChanged : News::kEmpty);
  if (error) std::rethrow_exception(error);
  if (has_changed) return;  // what comes after a round comes after that of the next reducer
  const auto after_round = after_round_;  // it may set another
  if (after_round) after_round();
}

void Reducer::abandon_round() noexcept {
  const std::lock_guard lock(mutex_);
  if (phase_ == Phase::kFinalized) phase_ = Phase::kBetween;
  if (!round_) return;
  const c10::NoGradGuard no_grad;
  // Autograd's thread, with no node running, is on the default stream, which nothing orders behind
  // the round before.
  c10::OptionalStreamGuard guard(round_->stream);
  try {
    flush(false);
    left_news_ = LeftNews{round_->waits, marked(), /*has_changed=*/false};
  } catch (...) {  // the backward's own exception is on its way to the user and says more
  }
  drop_round();
}

// Collectives may still write to the buckets, so the next round gets its own. On a GPU memory is
// free for others as soon as it is dropped here, so it is held until then; on the CPU the transport
// holds it.
void Reducer::drop_round(Phase then) {
  if (has_streams(device_))
    std::move(round_->waits.begin(), round_->waits.end(), std::back_inserter(abandoned_));
  end_round(then);
  installed_ = false;
}

// When a backward on a GPU raises, the thread that autograd ran it in may be the last to let go of
// it, a moment after the caller got its exception. What the caller launches next would come before
// the rest of the round, on this rank alone. (tests/streams/test_abandoned_rounds.py)
bool Reducer::settle() const {
  constexpr auto kPatience = std::chrono::seconds(10);
  const auto is_over = [this] {
    const Phase phase = phase_;
    return phase == Phase::kBetween || phase == Phase::kInFlight;
  };
  if (is_over() || !has_streams(device_) || torch::autograd::get_current_graph_task_id() != -1)
    return true;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!is_over() && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  return is_over();
}

void Reducer::shadow() {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  begin_round(Gives::kNothing);
  finish_round();
}

void Reducer::average() {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  begin_round(Gives::kWhatIsThere);
  finish_round();
}

// ---- one round -----------------------------------------------------------------------

void Reducer::begin_round(Gives gives) {
  // What waits for the host, or allocates, has no place in a graph. All ranks capture alike, so
  // agreements are put off on all of them.
  const bool captures = is_capturing(device_);
  if (!captures) {
    if (gives == Gives::kBackward && read_left_news()) {
      leave_news();
      TORCH_CHECK(false, "fastddp: rank ", rank_, ": ", owner_.title,
                  " has changed on a rank, and the others wait for this one to compare theirs, "
                  "since its latest backward has raised; run a forward in grad mode before the "
                  "next backward");
    }
    if (take_late_marks(false) && on_news_) on_news_(News::kChangedBefore);
    await_agreements();
  }
  TORCH_CHECK(!captures || (installed_ && !order_), "fastddp: rank ", rank_,
              ": a graph is being captured in one of the first two synchronised backwards of this "
              "model, or the first after one that raised; run it two times before the capture");
  TORCH_CHECK(
      !captures || !lazy_, "fastddp: rank ", rank_,
      ": a graph would go on to write to buckets that lazy_bucket_allocation=True leaves to "
      "the script; wrap the model without it");
  captured_ |= captures;
  // Without unhooking: autograd may be going through the hooks just now.
  if (!is_checked_ && is_stale()) announce_change();
  is_checked_ = false;
  if (!installed_) {
    install_plan();
  } else if (!captured_) {  // a graph goes on to write where it did
    leave_what_is_held();
  }
  order_in_group_->begin(this);
  round_ = std::make_unique<Round>(plan_, params_.size(), gives);
  if (has_streams(device_)) round_->stream = current_stream(device_);
  round_->is_manual = manual_ && gives == Gives::kBackward;
  round_->is_captured = captures;
  began_ns_ = ns_of(round_->began);
  round_->is_early = schedule_.begin() || !may_launch_late() || round_->is_manual;
  phase_ = Phase::kFilling;
}

void Reducer::end_round(Phase then) {
  order_in_group_->end(this);
  round_.reset();
  phase_ = then;
  const std::lock_guard lock(report_mutex_);
  report_.stats = stats_;
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
  std::optional<shm::Heap::KeepsPages> keeps_pages;
  if (runs_inline_) keeps_pages.emplace(shm::Heap::mine());
  // Frees the old buckets before the new are allocated. A graph goes on to write to its own.
  if (captured_) {
    std::move(buckets_.begin(), buckets_.end(), std::back_inserter(of_graphs_));
    if (loose_) of_graphs_.push_back(*std::move(loose_));
    captured_ = false;
  }
  buckets_.clear();
  loose_.reset();
  for (Param& param : params_) {
    param.slot.reset();
    param.place.reset();
    param.flag.reset();
  }
  const std::size_t num_sparse = params_.size() - num_dense();
  const std::size_t num_loose = num_sparse + (hook_ ? num_dense() : 0);
  if (num_loose > 0) {
    const auto numel = static_cast<std::int64_t>(num_loose);
    const at::Tensor loose = allocate(numel + static_cast<std::int64_t>(kNumMarks), at::kFloat);
    loose_ = lend(loose, loose, 0, numel, launch_of_flags());
  }
  buckets_.resize(plan_.size());
  for (std::size_t i = 0; i < plan_.size(); ++i) {
    for (const SlotPlan& slot : plan_[i].slots)
      params_[static_cast<std::size_t>(slot.param)].bucket = i;
    if (!lazy_) buckets_[i] = install_bucket(i);
    const auto bytes_each = c10::elementSize(wire_dtype(dtype_of_bucket(i)));
    stats_.bytes_per_round += plan_[i].numel * static_cast<std::int64_t>(bytes_each);
  }
  for (std::size_t i = 0; i < num_sparse; ++i)  // the last ones
    params_[num_dense() + i].flag =
        loose_->flags[static_cast<std::int64_t>(num_loose - num_sparse + i)];
  drain_current_stream(device_);  // other streams may be the first to write to the buckets
  installed_ = true;
}

// Of its gradients, as real numbers.
at::ScalarType Reducer::dtype_of_bucket(std::size_t bucket) const {
  const auto param = static_cast<std::size_t>(plan_[bucket].slots.front().param);
  return c10::toRealValueType(c10::typeMetaToScalarType(params_[param].layout.options.dtype()));
}

// Allocates a bucket in the midst of a round, unless it is there.
void Reducer::install_lazily(std::size_t bucket) {
  if (buckets_[bucket].flat.defined()) return;
  buckets_[bucket] = install_bucket(bucket);
  round_->fillings[bucket].touched.by_current(device_);
}

// Leaves the buckets to the script: no reference from in here keeps them alive. What stays is
// small, and in memory of its own.
void Reducer::leave_buckets() {
  round_->waits.clear();
  round_->fillings.clear();
  if (let_go_) let_go_();
  for (std::size_t i = 0; i < num_dense(); ++i) {
    params_[i].slot.reset();
    params_[i].place.reset();
    params_[i].flag.reset();
  }
  for (std::size_t i = num_dense(); i < params_.size(); ++i)
    params_[i].slot = empty_sparse(params_[i].layout);
  for (Bucket& bucket : buckets_) {
    Bucket left;
    left.flags = bucket.flags.clone();
    left.sent_marks = bucket.sent_marks;
    bucket = std::move(left);
  }
}

Reducer::Bucket Reducer::install_bucket(std::size_t index) {
  const BucketPlan& plan = plan_[index];
  const auto num_slots = static_cast<std::int64_t>(plan.slots.size());
  const auto dtype = dtype_of_bucket(index);
  const at::Tensor wire = allocate(plan.numel, wire_dtype(dtype));
  const at::Tensor flat =
      wire.scalar_type() == dtype ? wire : at::zeros_like(wire, wire.options().dtype(dtype));
  Bucket bucket = lend(flat, wire, plan.flags_offset, hook_ ? 0 : num_slots, index);
  if (hook_) {
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < index; ++i)
      begin += static_cast<std::int64_t>(plan_[i].slots.size());
    bucket.flags = loose_->flags.narrow(0, begin, num_slots);
    bucket.marks.reset();
  } else if (flattens_) {
    bucket.ones = at::ones({num_slots}, flat.options());
  }
  for (std::int64_t i = 0; i < num_slots; ++i) {
    const SlotPlan& slot = plan.slots[static_cast<std::size_t>(i)];
    Param& param = params_[static_cast<std::size_t>(slot.param)];
    param.slot = make_slot(flat, slot, param.layout, static_cast<bool>(hook_));
    param.place = make_place(as_real(param.slot), wire, slot);
    param.flag = bucket.flags[i];
  }
  bucket.references = num_references(flat);  // last: views refer to the memory too
  return bucket;
}

// The parts of a buffer with `num_flags` flags, and marks behind them.
Reducer::Bucket Reducer::lend(const at::Tensor& flat,
                              const at::Tensor& wire,
                              std::int64_t flags_offset,
                              std::int64_t num_flags,
                              std::size_t launch) const {
  const Marks marks =
      marks_of(label_of(owner_.number, static_cast<std::uint32_t>(launch)), retired_);
  constexpr auto kNumel = static_cast<std::int64_t>(kNumMarks);
  Bucket bucket;
  bucket.flat = flat;
  if (has_streams(device_)) bucket.home = current_stream(device_);
  bucket.wire = wire;
  bucket.flags = wire.narrow(0, flags_offset, num_flags);
  if (flags_offset + num_flags + kNumel <= wire.numel())
    bucket.marks = wire.narrow(0, flags_offset + num_flags, kNumel);
  bucket.gradients = flat.narrow(0, 0, flags_offset);
  if (launch < buckets_.size()) bucket.sent_marks = buckets_[launch].sent_marks;
  if (!bucket.sent_marks.defined())
    bucket.sent_marks = at::tensor(at::ArrayRef<double>(marks), at::kDouble).to(flat.options());
  return bucket;
}

// Gives a bucket new memory if the script still refers to gradients in the old.
void Reducer::leave_what_is_held() {
  bool is_any_new = false;
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    if (!buckets_[i].flat.defined() || !is_held(i)) continue;  // lazy ones are nobody's here
    buckets_[i] = install_bucket(i);
    is_any_new = true;
  }
  // Other streams may be the first to write to the new ones.
  if (is_any_new) drain_current_stream(device_);
}

// Whether the script refers to gradients in a bucket. Those that lie in `.grad` as they were handed
// out are the round's own to write over; not if the reducer is retired, for then the next one needs
// them.
bool Reducer::is_held(std::size_t index) const {
  const Bucket& bucket = buckets_[index];
  const auto references = num_references(bucket.flat);
  if (references <= bucket.references) return false;
  const auto& slots = plan_[index].slots;
  const auto in_place = std::count_if(slots.begin(), slots.end(), [this](const SlotPlan& slot) {
    const Param& param = params_[static_cast<std::size_t>(slot.param)];
    return !retired_ && is_alias(param.variable.grad(), param.slot);
  });
  return references > bucket.references + static_cast<std::size_t>(in_place);
}

void Reducer::take(std::size_t index) {
  Param& param = params_[index];
  at::Tensor& grad = param.variable.mutable_grad();
  if (!grad.defined()) return;
  if (lazy_ && index < num_dense()) install_lazily(param.bucket);
  int& taken = round_->taken[index];
  if (index < num_dense() && is_as_handed_out(grad, param.slot)) round_->aliases[index] = grad;
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
    put_by(index, fitting(index, grad));
    round_->arrival.push_back(static_cast<std::int64_t>(index));
  } else {
    TORCH_CHECK(!round_->tracker.launched(param.bucket), "fastddp: rank ", rank_, ": parameter '",
                param.name, "' got gradient number ", taken + 1, " of one backward after ", taken,
                " had been sent, as many as it ever got before. This happens when re-entrant "
                "activation checkpoints begin to share a parameter in the midst of training; use "
                "checkpoint(..., use_reentrant=False)");
    accumulate(index, fitting(index, grad));
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
  while (round_->tracker.is_next_full() && order_in_group_->may_launch(this)) {
    launch(round_->tracker.pop());
    if (is_all_launched()) order_in_group_->end(this);
  }
}

// Whether the round has launched its buckets, and has nothing to follow them.
bool Reducer::is_all_launched() const {
  return round_->tracker.all_launched() && !loose_ && order_is_learned_ && !is_timing_due();
}

// The gradient in its parameter's shape, whatever the script has made of it; and where it lies in
// the bucket, either exactly in the slot or no longer there.
at::Tensor Reducer::fitting(std::size_t index, at::Tensor grad) const {
  const Param& param = params_[index];
  const at::IntArrayRef sizes = param.layout.sizes;
  if (grad.sizes() != sizes) {
    TORCH_CHECK(grad.numel() == c10::multiply_integers(sizes), "fastddp: rank ", rank_,
                ": parameter '", param.name, "' has shape ", sizes, ", but its .grad has shape ",
                grad.sizes(),
                "; set .grad to None or to a tensor of the parameter's shape before backward");
    grad = grad.reshape(sizes);
  }
  const bool overlaps = grad.is_alias_of(param.slot) &&
                        !(is_alias(grad, param.slot) && grad.strides() == param.slot.strides());
  return overlaps ? grad.clone() : grad;
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
  note_launch();
  if (lazy_) install_lazily(index);
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
    round_->waits.push_back(start_all_reduce(bucket.wire, index, waits));
    return;
  }
  std::vector<std::size_t> params;
  std::vector<std::int64_t> offsets;
  for (const SlotPlan& slot : plan.slots) {
    params.push_back(static_cast<std::size_t>(slot.param));
    offsets.push_back(slot.offset);
  }
  round_->waits.push_back(
      start_hook(index, bucket.gradients, std::move(params), std::move(offsets)));
}

// One after the other, with the flags.
void Reducer::fill_missing(std::size_t index, const std::vector<std::size_t>& missing) {
  RECORD_FUNCTION(kFillBucket, std::vector<c10::IValue>{buckets_[index].flat});
  buckets_[index].flags.fill_(1);
  if (buckets_[index].marks.defined()) buckets_[index].marks.copy_(buckets_[index].sent_marks);
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
  RECORD_FUNCTION(kFillBucket, std::vector<c10::IValue>{bucket.flat});
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
    pieces.push_back({bucket.sent_marks,
                      bucket.marks.storage_offset() - bucket.wire.storage_offset(),
                      bucket.marks.numel()});
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
  if (lies_like(place, grad) && grad.scalar_type() == buckets_[bucket].flat.scalar_type()) {
    pieces.push_back({grad, offset, grad.numel()});
  } else {
    write(place, grad, scale());
  }
}

void Reducer::launch_sparse(std::size_t index) {
  note_launch();
  Param& param = params_[index];
  round_->touched_sparse.by_current_after_all(device_);
  param.flag.fill_(1);
  if (round_->taken[index] == 0) {
    const Leftover leftover = take_leftover(index);
    param.slot =
        leftover.grad.defined() ? scale_sparse(leftover.grad, scale()) : empty_sparse(param.layout);
    if (!leftover.counts) param.flag.zero_();
  }
  const std::size_t nth = plan_.size() + index - num_dense();
  round_->waits.push_back(hook_ ? start_hook(nth, param.slot, {index}, {0})
                                : start_all_reduce(param.slot, nth));
}

void Reducer::launch_loose_flags() {
  if (!loose_) return;
  for (Filling& filling : round_->fillings) filling.touched.by_current_after_all(device_);
  loose_->marks.copy_(loose_->sent_marks);
  round_->waits.push_back(start_all_reduce(loose_->flat, launch_of_flags()));
}

// What this rank has, which did not come from the round's backward.
Reducer::Leftover Reducer::take_leftover(std::size_t index) {
  if (retired_) return {{}, false};  // it is for the reducer that comes after this one
  Param& param = params_[index];
  at::Tensor grad = std::move(param.variable.mutable_grad());
  at::Tensor old = grad;
  // What unsynchronised backwards left counts as this one's.
  bool accumulated = round_->gives == Gives::kWhatIsThere
                         ? grad.defined()
                         : round_->gives == Gives::kBackward && is_accumulated(param, grad);
  const bool is_dense = index < num_dense();
  if (is_dense && is_as_handed_out(grad, param.slot)) round_->aliases[index] = grad;
  if (is_dense && grad.defined()) {
    try {
      grad = fitting(index, grad.is_sparse() ? grad.to_dense() : grad);
    } catch (const c10::Error&) {  // thrown once the round is over: the other ranks wait for it
      if (!round_->error) round_->error = std::current_exception();
      grad.reset();
      accumulated = false;
    }
  }
  // The reduction overwrites the slot. If no rank has a new gradient the old must come back bit for
  // bit.
  if (is_dense && grad.defined() && !accumulated && grad.is_alias_of(param.slot))
    old = grad.clone();
  if (round_->gives == Gives::kNothing) grad.reset();
  if (!accumulated) round_->bystanders.push_back({index, std::move(old)});
  return {std::move(grad), accumulated};
}

bool Reducer::is_accumulated(const Param& param, const at::Tensor& grad) {
  const auto left = param.accumulated.lock();
  return left.defined() && left.get() == grad.unsafeGetTensorImpl();
}

Wait Reducer::start_all_reduce(at::Tensor tensor, std::size_t launch, bool waits) const {
  std::vector<at::Tensor> tensors{std::move(tensor)};
  c10d::AllreduceOptions options;
  options.asyncOp = !waits;
  const shm::Label label(shm::Label::of(owner_.number, static_cast<std::uint32_t>(launch + 1)));
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
  const shm::Label label(shm::Label::of(owner_.number, static_cast<std::uint32_t>(index + 1)));
  return hook_({index, count, buffer, std::move(params), std::move(offsets)});
}

// `waits`: whether the caller goes on to wait for all of it.
void Reducer::flush(bool waits) {
  for (auto bucket = round_->tracker.pop(); bucket != ReadyTracker::kNone;
       bucket = round_->tracker.pop()) {
    launch(bucket, waits && may_launch_late());
  }
  for (std::size_t i = num_dense(); i < params_.size(); ++i) launch_sparse(i);
  if (hook_) {  // its callbacks may communicate; see HookRunner in fastddp/engine/hooks.py
    for (const Wait& wait : round_->waits) wait();
    round_->waits.clear();
  }
  launch_loose_flags();
  if (!order_is_learned_ && round_->gives != Gives::kWhatIsThere) agree_on_order();
  if (is_timing_due()) agree_on_schedule();
  order_in_group_->end(this);
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
  const shm::Label label(shm::Label::of(owner_.number));
  const WithoutPythonObjects guard;
  agreement.work = group()->broadcast(agreement.tensors);
  order_ = std::move(agreement);
  order_is_learned_ = true;
}

void Reducer::agree_on_schedule() {
  Agreement agreement;
  agreement.tensors = {at::tensor({schedule_.early_us(), schedule_.late_us()}, at::kDouble)};
  const shm::Label label(shm::Label::of(owner_.number));
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

std::vector<Reducer::Marked> Reducer::marked() const {
  std::vector<Marked> marked;
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    if (buckets_[i].marks.defined()) marked.push_back({i, buckets_[i].marks});
  }
  if (loose_) marked.push_back({launch_of_flags(), loose_->marks});
  return marked;
}

// Whether the model of any rank has changed. Throws if the ranks have added up different buckets.
bool Reducer::read_marks() {
  if (!has_streams(device_)) return check_marks(marked());
  if (is_capturing(device_)) return false;
  // The host does not wait for a device unless this rank has news itself: the next round, or one
  // after it, finds the marks on the host.
  std::vector<at::Tensor> rows;
  std::vector<std::size_t> launches;
  for (const Marked& one : marked()) {
    rows.push_back(one.marks);
    launches.push_back(one.launch);
  }
  const at::Tensor copy = at::stack(rows).to(at::kCPU, /*non_blocking=*/true);
  late_marks_.push_back({copy, std::move(launches), c10::Event(device_.type())});
  late_marks_.back().done.record(current_stream(device_));
  return retired_ && take_late_marks(true);
}

// What read_marks() could not know on a device yet.
bool Reducer::take_late_marks(bool waits) {
  bool has_changed = false;
  while (!late_marks_.empty() && (waits || late_marks_.front().done.query())) {
    const LateMarks late = std::move(late_marks_.front());
    late_marks_.pop_front();
    if (waits) late.done.synchronize();
    std::vector<Marked> marked;
    for (std::size_t i = 0; i < late.launches.size(); ++i)
      marked.push_back({late.launches[i], late.rows[static_cast<std::int64_t>(i)]});
    has_changed |= check_marks(marked);
  }
  return has_changed;
}

bool Reducer::has_left_news() const {
  const std::lock_guard lock(mutex_);
  return left_news_.has_value();
}

bool Reducer::read_left_news() {
  const std::lock_guard lock(mutex_);
  if (!left_news_) return false;
  const LeftNews left = *std::exchange(left_news_, std::nullopt);
  try {
    for (const Wait& wait : left.waits) wait();
    return check_marks(left.marked) || left.has_changed;
  } catch (const std::exception&) {  // what comes next on the group says more
    return left.has_changed;
  }
}

void Reducer::leave_news() {
  const std::lock_guard lock(mutex_);
  left_news_ = LeftNews{{}, {}, /*has_changed=*/true};
}

bool Reducer::check_marks(const std::vector<Marked>& marked) const {
  bool any = false;
  for (const auto& [launch, marks] : marked) {
    const at::Tensor host = marks.to(at::kCPU, at::kDouble);
    const auto label = label_of(owner_.number, static_cast<std::uint32_t>(launch));
    if (is_mixed(label, host.const_data_ptr<double>())) {
      const std::string others = order_in_group_->others(owner_.number);
      TORCH_CHECK(false, "fastddp: rank ", rank_, ": ", describe(launch), " of ", owner_.title,
                  " was added up with a bucket of another model on the same group (",
                  others.empty() ? "none that this rank has" : others,
                  "), so these gradients are wrong; run the models' forwards in the same order on "
                  "all ranks");
    }
    any |= any_changed(host.const_data_ptr<double>());
  }
  return any;
}

// Whether no rank had a gradient for any parameter. On the CPU, where it is known.
bool Reducer::is_empty() const {
  if (retired_ || round_->gives == Gives::kWhatIsThere || has_streams(device_)) return false;
  return round_->bystanders.size() == params_.size() &&
         std::none_of(params_.begin(), params_.end(), [](const Param& one) { return one.used; });
}

void Reducer::hand_out() {
  for (Param& param : params_) param.accumulated.reset();
  if (retired_) return;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    Param& param = params_[i];
    param.expected = std::max(param.expected, round_->taken[i]);
    if (i >= num_dense()) {
      param.variable.mutable_grad() = param.slot;
    } else if (round_->aliases[i].defined()) {
      param.variable.mutable_grad() = std::move(round_->aliases[i]);
    } else {
      param.variable.mutable_grad() = param.slot.variable_data();
    }
  }
  counts_are_learned_ |= round_->gives == Gives::kBackward;
  read_flags();
  for (Bystander& bystander : round_->bystanders) {
    Param& param = params_[bystander.param];
    if (param.used) continue;
    param.variable.mutable_grad() = std::move(bystander.grad);
    if (stats_.rounds == 0) {
      const std::lock_guard lock(report_mutex_);
      report_.unused.push_back(param.name);
    }
  }
  for (const Bucket& bucket : buckets_) {  // `.grad` is going to be used here
    if (!bucket.home || current_stream(device_) == *bucket.home) continue;
    outlive(bucket.flat, current_stream(device_));
    outlive(bucket.wire, current_stream(device_));
  }
}

// Of the bystanders, whether any rank had a gradient. From a GPU they are read all at once; this is
// where the host waits, on a rank that has bystanders. A graph cannot: it goes by what was read
// last.
void Reducer::note_launch() {
  if (!round_->launched) round_->launched = std::chrono::steady_clock::now();
}

// Compares what this rank did not use with the round before.
void Reducer::note_unused() {
  if (round_->gives != Gives::kBackward) return;
  std::vector<std::size_t> unused;
  for (const Bystander& bystander : round_->bystanders) unused.push_back(bystander.param);
  std::sort(unused.begin(), unused.end());
  if (unused == unused_last_) return;
  stats_.is_static = stats_.is_static && !unused_last_;
  stats_.unused_bytes_last = 0;
  for (const std::size_t param : unused)
    stats_.unused_bytes_last += static_cast<std::int64_t>(params_[param].variable.nbytes());
  unused_last_ = std::move(unused);
}

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
  const std::lock_guard lock(report_mutex_);
  report_.plan = plan_;
}

// Zeroed, so that the padding between slots sums to zero for ever.
at::Tensor Reducer::allocate(std::int64_t numel, at::ScalarType dtype) const {
  const auto options = at::TensorOptions().dtype(dtype).device(device_);
  const auto owner = group();
  try {
    const auto backend = owner->getBackend(device_.type());
    if (backend->supportsTensorAlloc(device_.index()))
      return backend->allocateTensor(numel, options).zero_();
  } catch (const c10::OutOfMemoryError& error) {
    TORCH_WARN_ONCE(
        "fastddp: rank ", rank_, ": gradients are not in memory that the ranks share, ",
        "so reducing them takes several times as long: ", error.what_without_backtrace());
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
