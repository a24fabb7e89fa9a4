#include "reducer/reducer.h"

#include <ATen/ATen.h>
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
#include <numeric>
#include <thread>
#include <utility>

#include "reducer/refusals.h"
#include "tensor/streams.h"

namespace fastddp {
namespace {

std::int64_t ns_of(std::chrono::system_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

Context context_of(const std::vector<at::Tensor>& params,
                   const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                   bool lazy,
                   Owner owner) {
  const auto number = owner.number;
  const auto device = params.empty() ? c10::Device(c10::kCPU) : params.front().device();
  const bool is_inline = !params.empty() && device.is_cpu() && runs_inline(*group);
  return {std::move(owner), Group(group, number, device), device, lazy, is_inline};
}

std::unique_ptr<const Filler> make_filler(bool is_fused,
                                          const Parameters& params,
                                          c10::Device device) {
  if (is_fused) return std::make_unique<Fused>(params, device);
  return std::make_unique<OneByOne>(params);
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
    if (const auto alive = reducer.lock())
      alive->figures_.noting_errors([&] { alive->on_gradient(index); });
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
    reducer->figures_.noting_errors([this] { reducer->end_backward(); });
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
    : context_(context_of(params, group, lazy, std::move(owner))),
      frozen_(std::move(frozen)),
      order_in_group_(order_of(*group)),
      figures_(context_.owner.number),
      params_(std::move(params), std::move(names), num_sparse),
      filler_(make_filler(flattens.value_or(!context_.device.is_cpu()), params_, context_.device)),
      launcher_(std::make_shared<AllReduceLauncher>(context_, comm_dtype)),
      divisor_(group->getSize()),
      agreements_(context_),
      mark_reader_(context_, params_, *order_in_group_),
      installation_(context_, params_, std::move(caps_bytes), filler_->is_fused()),
      turn_(order_in_group_),
      on_board_(context_.owner.number, context_.group.id()) {
  order_in_group_->introduce(context_.owner.number, context_.owner.title);
  // Until the arrival order is known: gradients come back roughly in the reverse of the order of
  // registration.
  std::vector<std::int64_t> order(params_.num_dense());
  std::iota(order.rbegin(), order.rend(), 0);
  replan(order);
}

Reducer::~Reducer() = default;

void Reducer::attach() {
  for (std::size_t i = 0; i < params_.size(); ++i)
    params_[i].hook_with(std::make_unique<GradientHook>(weak_from_this(), i));
}

void Reducer::watch(const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad() || output.is_leaf()) continue;
    output.register_hook([reducer = weak_from_this()](const at::Tensor& /*grad*/) {
      if (const auto alive = reducer.lock())
        alive->figures_.noting_errors([&] { alive->on_backward(); });
    });
  }
}

void Reducer::close() {
  const std::lock_guard lock(mutex_);
  for (Parameter& param : params_) param.unhook();
  after_round_ = nullptr;
  closed_ = true;
}

// ---- what the script sets and asks ---------------------------------------------------

void Reducer::set_divisor(double divisor) {
  const std::lock_guard lock(mutex_);
  divisor_ = divisor;
}

void Reducer::set_hook(Hook hook, std::function<void()> let_go) {
  const std::lock_guard lock(mutex_);
  launcher_ = std::make_shared<HookLauncher>(context_, std::move(hook), std::move(let_go));
  replan(installation_.order());
  installation_.uninstall();  // slots and flags lie elsewhere now
}

void Reducer::set_after_round(std::function<void()> callback) {
  const std::lock_guard lock(mutex_);
  after_round_ = std::move(callback);
}

void Reducer::set_on_news(std::function<void(News)> callback) {
  const std::lock_guard lock(mutex_);
  on_news_ = std::move(callback);
}

bool Reducer::has_left_news() const {
  const std::lock_guard lock(mutex_);
  return mark_reader_.has_left_news();
}

bool Reducer::read_left_news() {
  const std::lock_guard lock(mutex_);
  return mark_reader_.read_left_news();
}

void Reducer::leave_news() {
  const std::lock_guard lock(mutex_);
  mark_reader_.leave_news();
}

std::vector<std::int64_t> Reducer::used_by() const {
  const Phase phase = phase_.get();
  if (phase == Phase::kFilling || phase == Phase::kInFlight)
    refusals::flags_of_a_round_under_way(context_);
  const std::lock_guard lock(mutex_);
  if (params_.size() == 0) return {};
  const Buckets* const buckets = installation_.buckets();
  if (figures_.now().rounds == 0 || buckets == nullptr)
    return std::vector<std::int64_t>(params_.size(), context_.group.size());
  // A fused pass scales the flags too.
  const double one = filler_->is_fused() ? latest_scale_ : 1;
  std::vector<std::int64_t> used(params_.size());
  for (const Bucket& bucket : *buckets) {
    const at::Tensor flags = bucket.flags.to(at::kCPU, at::kDouble);
    const auto* flag = flags.const_data_ptr<double>();
    for (const SlotPlan& slot : bucket.plan->slots)
      used[static_cast<std::size_t>(slot.param)] = std::llround(*flag++ / one);
  }
  for (std::size_t i = params_.num_dense(); i < params_.size(); ++i)
    used[i] = static_cast<std::int64_t>(params_[i].place.flag.item<double>());
  return used;
}

bool Reducer::outgrown() const {
  return std::any_of(frozen_.begin(), frozen_.end(),
                     [](const at::Tensor& param) { return param.requires_grad(); });
}

bool Reducer::is_stale() {
  const std::lock_guard lock(mutex_);
  is_checked_ = true;
  return !closed_ && params_.any_has_become_another();
}

void Reducer::retire() {
  const std::lock_guard lock(mutex_);
  for (Parameter& param : params_) {  // the others' gradients go on to begin rounds
    if (param.has_become_another()) param.unhook();
  }
  announce_change();
}

void Reducer::announce_change() {
  params_.retired = true;
  const c10::NoGradGuard no_grad;
  if (Buckets* const buckets = installation_.buckets()) buckets->announce_change();
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

// When a backward on a GPU raises, the thread that autograd ran it in may be the last to let go of
// it, a moment after the caller got its exception. What the caller launches next would come before
// the rest of the round, on this rank alone. (tests/streams/test_abandoned_rounds.py)
bool Reducer::settle() const {
  constexpr auto kPatience = std::chrono::seconds(10);
  const auto is_over = [this] {
    const Phase phase = phase_.get();
    return phase == Phase::kBetween || phase == Phase::kInFlight;
  };
  if (is_over() || !has_streams(context_.device) ||
      torch::autograd::get_current_graph_task_id() != -1)
    return true;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!is_over() && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  return is_over();
}

// ---- called by autograd --------------------------------------------------------------

void Reducer::on_backward() {
  // Not empty for autograd.grad() and backward(inputs=...), which need not involve the other ranks.
  if (!torch::autograd::get_current_graph_task_exec_info()->empty()) return;
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  const Phase phase = phase_.get();
  if (closed_ || phase == Phase::kFilling) return;
  if (phase != Phase::kBetween)
    refusals::backward_in(phase, context_,
                          "backward has reached an output of " + context_.owner.title);
  if (!sync_) return;
  if (!params_.retired && !params_.any_requires_grad()) return;
  begin_backward();
}

void Reducer::on_gradient(std::size_t param) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  const Phase phase = phase_.get();
  if (phase != Phase::kFilling) {
    if (phase != Phase::kBetween)
      refusals::backward_in(phase, context_,
                            "parameter '" + params_[param].name + "' got a gradient");
    if (!sync_) {
      params_[param].note_left();
      return;
    }
    begin_backward();
  }
  if (params_.retired) return;
  round_->take(param);
  on_board_.set_last_param(param);
  on_board_.set_launched(round_->num_launched());
}

void Reducer::begin_backward() {
  begin_round(Gives::kBackward);
  const auto end = std::make_shared<RoundEnd>(shared_from_this());
  torch::autograd::Engine::get_default_engine().queue_callback([end] { end->reach(); });
  end->open = true;
}

void Reducer::end_backward() {
  const std::lock_guard lock(mutex_);
  if (phase_.is(Phase::kFinalized)) {
    // What came after the hook that finalized has autograd's caller wait for its stream.
    move_to(Phase::kBetween);
  } else if (!round_) {
    return;
  } else if (round_->manner().is_manual) {
    leave_in_flight();
  } else {
    finish_round();
  }
}

void Reducer::abandon_round() noexcept {
  const std::lock_guard lock(mutex_);
  if (phase_.is(Phase::kFinalized)) move_to(Phase::kBetween);
  if (!round_) return;
  context_.record(events::Kind::kError);
  const c10::NoGradGuard no_grad;
  // Autograd's thread, with no node running, is on the default stream, which nothing orders behind
  // the round before.
  c10::OptionalStreamGuard guard(round_->stream());
  try {
    launch_rest(false);
    mark_reader_.leave(round_->waits(), round_->buckets());
  } catch (...) {  // the backward's own exception is on its way to the user and says more
  }
  drop_round();
}

// ---- the life of a round -------------------------------------------------------------

void Reducer::begin_round(Gives gives) {
  phase_.check_move(Phase::kFilling);
  context_.record(events::Kind::kRoundBegin, static_cast<std::uint64_t>(figures_.now().rounds));
  const bool is_captured = is_capturing(context_.device);
  if (is_captured) {
    check_capture();
  } else {
    read_news(gives);
    await_agreements();
  }
  // Without unhooking: autograd may be going through the hooks just now.
  if (!is_checked_ && is_stale()) announce_change();
  is_checked_ = false;
  Buckets& buckets = install(is_captured);
  turn_.begin();
  Manner manner;
  manner.gives = gives;
  manner.is_manual = manual_ && gives == Gives::kBackward;
  manner.is_captured = is_captured;
  manner.is_early =
      agreements_.schedule.begin() || !launcher_->may_launch_late() || manner.is_manual;
  manner.knows_counts = counts_are_learned_;
  manner.is_followed = buckets.loose() || !agreements_.order_is_learned() || is_timing_due();
  manner.scale = latest_scale_ = launcher_->scale(divisor_);
  round_ = std::make_unique<Round>(context_, params_, buckets, launcher_, *filler_, figures_, turn_,
                                   manner);
  began_ns_ = ns_of(round_->began());
  move_to(Phase::kFilling);
}

// What waits for the host, or allocates, has no place in a graph. All ranks capture alike, so
// agreements are put off on all of them.
void Reducer::check_capture() const {
  if (installation_.buckets() == nullptr || agreements_.is_order_under_way())
    refusals::capture_too_early(context_);
  if (context_.lazy) refusals::capture_of_lazy_buckets(context_);
}

// Reads what the ranks have said in earlier rounds and this one could not know yet.
void Reducer::read_news(Gives gives) {
  if (gives == Gives::kBackward && mark_reader_.read_left_news()) {
    mark_reader_.leave_news();
    refusals::backward_before_agreement(context_);
  }
  if (mark_reader_.take_late(false) && on_news_) on_news_(News::kChangedBefore);
}

void Reducer::await_agreements() {
  if (const auto order = agreements_.await_order()) replan(*order);
  agreements_.await_schedule();
}

// The plan's buckets, in memory that this round may write to.
Buckets& Reducer::install(bool is_captured) {
  if (Buckets* const buckets = installation_.buckets()) {
    buckets->begin_round(is_captured);
    return *buckets;
  }
  Buckets& buckets = installation_.install(launcher_->form());
  figures_.now().num_buckets = static_cast<std::int64_t>(buckets.size());
  figures_.now().bytes_per_round = buckets.bytes_per_round();
  return buckets;
}

void Reducer::leave_in_flight() {
  const c10::NoGradGuard no_grad;
  context_.record(events::Kind::kBackwardEnd);
  try {
    figures_.now().backward_us_last = round_->us_since_begin();
    launch_rest(false);
  } catch (...) {
    drop_round();
    throw;
  }
  move_to(Phase::kInFlight);
}

// `waits`: whether the caller goes on to wait for all of it.
void Reducer::launch_rest(bool waits) {
  round_->launch_rest(waits);
  on_board_.set_launched(round_->num_launched());
  if (!agreements_.order_is_learned() && round_->manner().gives != Gives::kWhatIsThere)
    agreements_.start_with_order(round_->order_of_arrival());
  if (is_timing_due()) agreements_.start_with_schedule();
  turn_.end();
}

void Reducer::finalize() {
  figures_.noting_errors([this] { finalize_round(); });
}

void Reducer::finalize_round() {
  const std::lock_guard lock(mutex_);
  if (!round_ || !round_->manner().is_manual) refusals::finalization_of_nothing(context_);
  if (round_->manner().is_captured != is_capturing(context_.device))
    refusals::finalization_in_another_graph(context_);
  if (phase_.is(Phase::kInFlight)) {
    check_params();
    finish_round();
    return;
  }
  if (!round_->is_all_launched() && !turn_.has_come())
    refusals::finalization_out_of_turn(context_, order_in_group_->others(context_.owner.number));
  finish_round(Phase::kFinalized);
}

// Whether parameters still have the layouts that the gradients in flight have.
void Reducer::check_params() {
  if (params_.retired) return;
  for (const Parameter& param : params_) {
    if (param.layout.is_that_of(param.variable)) continue;
    drop_round();
    refusals::finalization_of_another_layout(context_, param);
  }
}

void Reducer::finish_round(Phase then) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  const Gives gives = round_->manner().gives;
  Stats& stats = figures_.now();
  bool has_changed = false;
  try {
    RECORD_FUNCTION("fastddp.reducer::finish_round", {});
    const auto start = std::chrono::steady_clock::now();
    if (phase_.is(Phase::kFilling)) {
      context_.record(events::Kind::kBackwardEnd);
      stats.backward_us_last = round_->us_since_begin();
      launch_rest(true);
    }
    round_->wait();
    stats.wait_us_last = us_since(start);
    stats.comm_us_last = round_->us_since_launch();
    has_changed = mark_reader_.read(round_->buckets());
    round_->hand_out();
    counts_are_learned_ |= gives == Gives::kBackward && !params_.retired;
    if (context_.lazy) round_->leave_buckets();
  } catch (...) {
    drop_round(then);
    throw;
  }
  stats.wait_us_total += stats.wait_us_last;
  ++stats.rounds;
  stats.overlaps = round_->manner().is_early;
  stats.began_ns = ns_of(round_->began());
  if (gives == Gives::kBackward)
    figures_.note_unused(round_->unused(),
                         [this](std::size_t param) { return params_[param].variable.nbytes(); });
  if (gives != Gives::kNothing)
    agreements_.schedule.add(round_->manner().is_early, round_->us_since_begin());
  const bool was_empty = round_->is_empty();
  const auto error = round_->error();
  end_round(then);
  const auto on_news = on_news_;
  if (on_news && (has_changed || was_empty)) on_news(has_changed ? News::kChanged : News::kEmpty);
  if (error) std::rethrow_exception(error);
  if (has_changed) return;  // what comes after a round comes after that of the next reducer
  const auto after_round = after_round_;  // it may set another
  if (after_round) after_round();
}

// Collectives may still write to the buckets, so the next round gets its own.
void Reducer::drop_round(Phase then) {
  std::vector<Wait> waits = round_->waits();
  end_round(then);
  installation_.uninstall(std::move(waits));
}

void Reducer::move_to(Phase phase) {
  phase_.move_to(phase);
  on_board_.set_phase(phase, static_cast<std::uint64_t>(figures_.now().rounds));
}

void Reducer::end_round(Phase then) {
  turn_.end();
  context_.record(events::Kind::kRoundEnd, round_->step());
  round_.reset();
  move_to(then);
  figures_.publish();
}

void Reducer::replan(const std::vector<std::int64_t>& order) {
  agreements_.schedule = Schedule();  // here, where all ranks are in the same round
  if (installation_.replan(order, launcher_->form())) figures_.set_plan(installation_.plan());
}

}  // namespace fastddp
