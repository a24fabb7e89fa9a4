// The C++ engine: gradients into buckets, buckets into collectives, while backward goes on.
//
// One synchronised backward is a *round*. Its life:
//   first gradient     -> begin_round(): install the plan if a new one is due, queue finish_round()
//                         on the backward
//   each gradient      -> take(): scale it into its bucket, empty `.grad`, launch the buckets that
//                         are full, in plan order, unless the round's schedule has them wait. On a
//                         GPU it is only put by, and one kernel flattens the bucket once it is full
//   end of backward    -> finish_round(): launch what is left, wait, make each `.grad` the reduced
//                         slot
//   backward raised    -> abandon_round(): launch what is left and wait for nothing but hooks. On a
//                         GPU a thread of autograd's may do it while the caller goes on: settle()
//   a manual round     -> the end of backward launches what is left and leaves it in flight;
//                         finalize(), which the script calls, does the rest. Called before backward
//                         is over it does all of it
//
// Invariants, each with the test that guards it:
// * A round begins when backward reaches an output of forward, or at the first gradient if there is
//   no such output. The former is the same on every rank, whatever parameters it goes on to reach,
//   and is outside of any re-entrant backward. (test_accumulation.py)
// * Every rank launches every bucket of the plan in every round, also those it has no gradient for,
//   then every sparse gradient. Ranks therefore stay in step when they use different parameters or
//   when one of them raises. (test_accumulation.py)
// * `.grad` is empty while its bucket is in flight, so nothing but the collective can touch a
//   launched bucket: a second gradient of the same parameter arrives in fresh memory.
//   (test_gradients.py)
// * The reducer never owns its process group. Freeing a group joins its threads; doing so from a
//   destructor that holds the GIL deadlocks. (test_launch.py)
// * What becomes `.grad` is an alias of the slot and belongs to the script, which may do with it
//   what it likes: the slot itself stays here. (tests/parity/test_grad_is_the_scripts.py)
// * Memory is allocated at the head of a round only, and only when the plan is new or the script
//   still refers to gradients in a bucket, other than by `.grad`: then the bucket is left to it.
//   Lazy buckets are allocated within a round, and left to the script at its end; no graph can hold
//   such a round. (test_lazy_buckets.py)
//   (Tables of a fused pass are kernel arguments, so a CUDA graph can hold a round.)
// * A bucket is launched when every round that began before, on the same group, has launched all
//   that it has. (test_two_models.py)
// * A reducer whose model has changed is retired: it takes part in rounds with nothing to add, and
//   tells the other ranks by the marks of its buckets, until another takes its place.
//   (test_changed_models.py)
// * On a GPU whatever touches a bucket waits for the streams that have touched it before, by
//   events; the host waits for nothing but the flags of parameters that this rank has no gradient
//   for. At the end of a round the stream that called backward is behind all of it.
//   (tests/streams)
// * Whoever waits for the mutex does not hold the GIL: a hook takes the GIL under the mutex. What
//   others ask for at any time, stats() and the like, is not under the mutex: it is held while a
//   round waits. (test_questions.py)
//
// `fastddp/engine/python/reducer.py` is this file's specification: same collectives, same bits.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/launch_order.h"
#include "core/marks.h"
#include "core/plan.h"
#include "core/schedule.h"
#include "core/tracker.h"
#include "tensor/flatten.h"
#include "tensor/layout.h"
#include "tensor/streams.h"

namespace fastddp {

// Host-side figures of the rounds so far. Waiting is only seen by the host for collectives on the
// CPU.
struct Stats {
  std::int64_t rounds = 0;
  double wait_us_total = 0;  // spent at the end of backward until the last bucket was reduced
  double wait_us_last = 0;
  std::int64_t bytes_per_round = 0;
  std::int64_t num_buckets = 0;
  bool overlaps = true;         // whether the latest round launched buckets while backward went on
  std::int64_t began_ns = 0;    // since the epoch; this and the next three are of the latest round
  double backward_us_last = 0;  // from its beginning until its backward was through
  double comm_us_last = 0;      // from its first collective until the last bucket was reduced
  std::int64_t unused_bytes_last = 0;  // of the parameters that this rank had no gradient for
  bool is_static = true;               // whether these have been the same in every round
};

// What others may ask for while a round is under way: as it was at the latest turn of events.
struct Report {
  Stats stats;
  std::vector<BucketPlan> plan;
  std::vector<std::string> unused;
  std::string error;  // the latest that an entry from autograd, or finalize(), has thrown
};

// Whose gradients a reducer averages.
struct Owner {
  std::uint32_t number = 0;  // tells its collectives from another's on the group
  std::string title = "the model";
};

// Why a reducer calls back, beside the end of a round; see fastddp/engine/news.py.
enum class News { kEmpty, kChanged, kChangedBefore };

// What a communication hook is given: gradients as they are, not yet scaled.
struct HookInput {
  std::size_t index;
  std::size_t count;                  // of buckets, and of sparse gradients, in a round
  at::Tensor buffer;                  // the gradients and nothing else; or one sparse gradient
  std::vector<std::size_t> params;    // whose they are
  std::vector<std::int64_t> offsets;  // where in the buffer each begins
};

using Wait = std::function<void()>;
// Starts to communicate. The result is in the buffer once the function that it returns has run.
using Hook = std::function<Wait(const HookInput&)>;

class Reducer final : public std::enable_shared_from_this<Reducer> {
 public:
  // `params` are on one device, and the last `num_sparse` of them get sparse gradients; `names` are
  // theirs, for messages. `frozen` are the model's other parameters. `comm_dtype`, if given, is
  // what gradients of up to 32 bits are cast to for the all-reduce. `flattens`: whether a bucket is
  // filled in one pass, once it is full, and not gradient by gradient; by default everywhere but on
  // the CPU. `lazy`: a bucket is allocated when its first gradient arrives, and left to the script
  // at the end of the round.
  Reducer(std::vector<at::Tensor> params,
          std::vector<std::string> names,
          std::size_t num_sparse,
          std::vector<at::Tensor> frozen,
          const c10::intrusive_ptr<c10d::ProcessGroup>& group,
          std::vector<std::int64_t> caps_bytes,
          std::optional<at::ScalarType> comm_dtype,
          std::optional<bool> flattens,
          bool lazy,
          Owner owner);
  ~Reducer();
  Reducer(const Reducer&) = delete;
  Reducer& operator=(const Reducer&) = delete;

  // Hooks every parameter's gradient accumulation. Apart from the constructor because hooks need a
  // shared owner.
  void attach();
  // Tells the reducer what forward has returned.
  void watch(const std::vector<at::Tensor>& outputs);
  // Removes the hooks; the parameters' gradients are then left alone.
  void close();

  // Whether a backward that begins now is synchronised.
  void set_sync(bool sync) { sync_ = sync; }
  bool sync() const { return sync_; }
  // Whether the round of a backward that begins now ends with finalize(), not with its backward.
  void set_manual(bool manual) { manual_ = manual; }
  bool manual() const { return manual_; }
  // What gradients are divided by, from the next round on: the number of ranks unless told.
  void set_divisor(double divisor);
  // Hands the gradients to `hook` from the next round on, in place of the all-reduce. `let_go` has
  // it keep no reference to buckets that have been waited for.
  void set_hook(Hook hook, std::function<void()> let_go);
  // Has `callback` called at the end of each round, once gradients are where they belong.
  void set_after_round(std::function<void()> callback);
  // Has `callback` called when a round brought news, on all ranks alike.
  void set_on_news(std::function<void(News)> callback);
  // Whether the latest round may have brought news that nobody has answered, since its backward
  // has raised; and whether it brought the one that a model has changed, for which it waits until
  // the round's collectives have ended.
  bool has_left_news() const;
  bool read_left_news();
  // Has the next read_left_news() say so.
  void leave_news();
  // When the latest round began, in nanoseconds since the epoch.
  std::int64_t began_ns() const { return began_ns_; }
  // Takes part in a round of the other ranks with nothing to add.
  void shadow();
  // Averages what is in `.grad`, wherever it comes from.
  void average();
  // Whether a manual round waits for finalize(); its backward is over.
  bool is_in_flight() const { return phase_ == Phase::kInFlight; }
  // Waits for a manual round's collectives and writes its gradients to `.grad`. While its backward
  // still runs, it first launches what is left: no further gradient may come in that backward.
  void finalize();
  // Whether a parameter has another layout, dtype, device or gradient node than when it was hooked.
  bool is_stale();
  // Leaves the parameters alone, for the model has changed, and says so in the next round.
  void retire();
  // Waits for another thread to end a round that its backward has left by an exception. Returns
  // whether it has; after 10 s it gives up, for a thread may as well run a long backward.
  bool settle() const;

  // At any time, from any thread. Waits for nothing.
  Stats stats() const;
  std::vector<BucketPlan> plan() const;
  // The names of the parameters that no rank had a gradient for in the first round.
  std::vector<std::string> unused() const;
  // What the latest error in a backward said; empty if there was none.
  std::string error() const;
  // By parameter, how many ranks had a gradient for it in the latest round; not in a round.
  std::vector<std::int64_t> used_by() const;
  // Whether a parameter that was frozen requires grad now, so that another reducer is needed.
  bool outgrown() const;

 private:
  friend struct GradientHook;
  friend struct RoundEnd;
  // Named by the compiler: torch has changed the smart pointer's type before.
  using NodePtr =
      decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));

  struct Param {
    at::Tensor variable;
    std::string name;
    Layout layout;        // as it was when the ranks were compared
    NodePtr accumulator;  // the tensor itself holds only a weak reference
    std::uintptr_t hook = 0;
    std::size_t bucket = 0;  // if dense
    // Where its reduced gradient lies, shaped and strided like the parameter. A sparse gradient has
    // no place in a bucket: then this is what the round makes of it.
    at::Tensor slot;
    at::Tensor place;  // where it lies to be reduced: the slot as real numbers, or its like in the
                       // bucket's `wire`
    at::Tensor flag;   // one element: whether any rank had a gradient
    bool used = true;  // whether any had, when a flag was last read
    // The gradient that backwards which were not synchronised have left, so long as nobody replaces
    // or drops it.
    c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> accumulated{
        c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>()};
    int expected = 1;  // gradients per round: the most that there have been
  };

  struct Bucket {
    at::Tensor flat;   // what the slots are in
    at::Tensor wire;   // what is reduced: `flat` itself unless there is a dtype for communication
    at::Tensor flags;  // in its tail, so that they need no collective; or in those of `loose_`
    at::Tensor marks;  // behind the flags; undefined if these are loose ones
    at::Tensor gradients;             // the part of `flat` that a hook is given
    at::Tensor ones;                  // one per slot, to set flags from in the fused pass
    at::Tensor sent_marks;            // to set marks from
    std::size_t references = 0;       // to the memory of `flat`, from in here
    std::optional<c10::Stream> home;  // that it was allocated on
  };

  // A gradient that waits for the fused pass over its bucket.
  struct Pending {
    std::size_t param;
    at::Tensor grad;
    c10::Stream stream;
  };

  // Where a reducer is in the life of a round.
  enum class Phase {
    kBetween,    // rounds
    kFilling,    // backward brings gradients
    kInFlight,   // backward is over, all is launched, and finalize() is to come
    kFinalized,  // finalize() has come, but the backward is not over yet
  };

  // What this rank adds to a round.
  enum class Gives { kBackward, kWhatIsThere, kNothing };

  // The state of a bucket in a round.
  struct Filling {
    std::vector<Pending> pending;  // in the order of arrival
    bool is_flattened = false;
    Touched touched;
  };

  // What this rank has for a parameter that the round's backward gave no gradient.
  struct Leftover {
    at::Tensor grad;  // undefined when there is none
    bool counts;      // as a gradient of this round
  };

  // A gradient that the round's own backward did not produce, as it was before the round.
  struct Bystander {
    std::size_t param;
    at::Tensor grad;  // undefined when there was none
  };

  struct Round {
    Round(const std::vector<BucketPlan>& plan, std::size_t num_params, Gives gives)
        : gives(gives),
          tracker(plan),
          taken(num_params, 0),
          aliases(num_params),
          fillings(plan.size()) {}
    const Gives gives;
    std::optional<c10::Stream> stream;  // that it began on
    ReadyTracker tracker;
    std::vector<int> taken;           // by parameter, gradients so far
    std::vector<at::Tensor> aliases;  // what was in `.grad`, where that is as it was handed out
    std::vector<Filling> fillings;    // by bucket
    Touched touched_sparse;           // the sparse gradients
    bool is_manual = false;           // finalize() ends it, not the end of its backward
    bool is_early = true;             // buckets are launched as they fill
    bool is_captured = false;         // it is recorded into a graph
    const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    const std::chrono::system_clock::time_point began = std::chrono::system_clock::now();
    std::optional<std::chrono::steady_clock::time_point> launched;  // the first collective
    std::vector<std::int64_t> arrival;
    std::vector<Wait> waits;  // in the order of launching
    std::vector<Bystander> bystanders;
    std::exception_ptr error;  // what is wrong with a gradient, for the end of the round
  };

  // The marks of a collective.
  struct Marked {
    std::size_t launch;
    at::Tensor marks;
  };

  // Marks on their way from a device to the host, which goes on meanwhile.
  struct LateMarks {
    at::Tensor rows;
    std::vector<std::size_t> launches;  // by row
    c10::Event done;
  };

  // What there is to know of a round that its backward has left by an exception.
  struct LeftNews {
    std::vector<Wait> waits;
    std::vector<Marked> marked;
    bool has_changed;
  };

  // What the ranks agree on between two rounds: from the end of one to the head of the next.
  struct Agreement {
    std::vector<at::Tensor> tensors;
    c10::intrusive_ptr<c10d::Work> work;
  };

  template <typename Entry>
  void noting_errors(Entry entry);
  void on_backward();
  void on_gradient(std::size_t param);
  void end_backward();
  void finish_round(Phase then = Phase::kBetween);
  void abandon_round() noexcept;

  void begin_round(Gives gives);
  void finalize_round();
  void leave_in_flight();
  void launch_rest(bool waits);
  void end_round(Phase then);
  void drop_round(Phase then = Phase::kBetween);
  void check_params();
  [[noreturn]] void refuse_backward(const std::string& what) const;
  void queue_end();
  void install_plan();
  Bucket install_bucket(std::size_t bucket);
  at::ScalarType dtype_of_bucket(std::size_t bucket) const;
  void install_lazily(std::size_t bucket);
  void leave_buckets();
  Bucket lend(const at::Tensor& flat,
              const at::Tensor& wire,
              std::int64_t flags_offset,
              std::int64_t num_flags,
              std::size_t launch) const;
  void leave_what_is_held();
  bool is_held(std::size_t bucket) const;
  bool is_all_launched() const;
  bool is_timing_due() const { return may_launch_late() && schedule_.is_due(); }
  at::Tensor fitting(std::size_t param, at::Tensor grad) const;
  std::vector<Marked> marked() const;
  bool read_marks();
  bool take_late_marks(bool waits);
  bool check_marks(const std::vector<Marked>& marked) const;
  bool is_empty() const;
  static bool has_become_another(const Param& param);
  void announce_change();
  static void unhook(Param& param);
  void take(std::size_t param);
  void put_by(std::size_t param, at::Tensor grad);
  void accumulate(std::size_t param, const at::Tensor& grad);
  void launch(std::size_t bucket, bool waits = false);
  void fill_missing(std::size_t bucket, const std::vector<std::size_t>& missing);
  void flatten_bucket(std::size_t bucket, const std::vector<std::size_t>& missing);
  void add_piece(std::vector<FlatPiece>& pieces,
                 std::size_t bucket,
                 std::size_t param,
                 const at::Tensor& grad) const;
  void launch_sparse(std::size_t param);
  void launch_loose_flags();
  void flush(bool waits);
  Leftover take_leftover(std::size_t param);
  bool may_launch_late() const { return runs_inline_ && !hook_; }
  static bool is_accumulated(const Param& param, const at::Tensor& grad);
  Wait start_all_reduce(at::Tensor tensor, std::size_t launch, bool waits = false) const;
  Wait start_hook(std::size_t index,
                  const at::Tensor& buffer,
                  std::vector<std::size_t> params,
                  std::vector<std::int64_t> offsets) const;
  void agree_on_order();
  void agree_on_schedule();
  void await_agreements();
  void wait_for(std::size_t launch);
  void hand_out();
  void read_flags();
  void note_launch();
  void note_unused();
  void cast_back(std::size_t bucket);
  void replan(const std::vector<std::int64_t>& order);
  at::Tensor allocate(std::int64_t numel, at::ScalarType dtype) const;
  at::ScalarType wire_dtype(at::ScalarType dtype) const;
  c10::intrusive_ptr<c10d::ProcessGroup> group() const;
  std::string describe(std::size_t launch) const;
  std::size_t num_dense() const { return specs_.size(); }
  // Collectives of a round are numbered: buckets, sparse gradients, flags.
  std::size_t launch_of_flags() const { return plan_.size() + params_.size() - num_dense(); }
  // With a hook, gradients go to it as they are.
  double scale() const { return hook_ ? 1.0 : 1.0 / divisor_; }

  // Fixed for the reducer's life.
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> group_;
  const int rank_;
  const int size_;  // of the group
  const std::vector<std::int64_t> caps_bytes_;
  const std::vector<at::Tensor> frozen_;
  const c10::Device device_;
  const std::optional<at::ScalarType> comm_dtype_;
  const bool flattens_;
  const bool lazy_;
  // Whether a collective that is waited for at once costs no switch of threads.
  const bool runs_inline_;
  const Owner owner_;
  const std::shared_ptr<LaunchOrder> order_in_group_;
  std::vector<ParamSpec> specs_;  // of the dense parameters, which come first

  std::atomic<bool> sync_{true};
  std::atomic<std::int64_t> began_ns_{0};
  std::atomic<bool> manual_{false};
  std::atomic<Phase> phase_{Phase::kBetween};  // written under the mutex

  // Guards what others ask for, and is held to copy it only.
  mutable std::mutex report_mutex_;
  Report report_;

  // Guards all below. Recursive: what is called at the end of a round may go on to close() or
  // average().
  mutable std::recursive_mutex mutex_;
  std::vector<Param> params_;
  double divisor_;
  Hook hook_;
  std::function<void()> let_go_;
  std::function<void()> after_round_;
  std::function<void(News)> on_news_;
  std::vector<BucketPlan> plan_;
  bool closed_ = false;
  bool retired_ = false;
  bool is_checked_ = false;           // for parameters that are stale, since the latest round
  bool installed_ = false;            // whether the next two are the plan's
  std::vector<Bucket> buckets_;       // lazy ones are there in rounds only, but for flags and marks
  bool captured_ = false;             // whether a graph refers to them
  std::vector<Bucket> of_graphs_;     // former buckets that graphs refer to
  std::vector<Wait> abandoned_;       // for collectives that may still write to them
  std::optional<Bucket> loose_;       // flags that travel in no bucket, and marks
  std::deque<LateMarks> late_marks_;  // of rounds, on a device
  std::optional<LeftNews> left_news_;
  std::optional<Agreement> order_;  // of arrival in the first round, from rank 0
  bool order_is_learned_ = false;
  bool counts_are_learned_ = false;  // a round has ended well on this rank
  Schedule schedule_;                // of the plan
  std::optional<Agreement> timing_;  // the ranks' times, on their way
  Stats stats_;
  std::optional<std::vector<std::size_t>> unused_last_;  // by this rank, in the latest round
  std::unique_ptr<Round> round_;  // while the phase is kFilling or kInFlight, else null
};

}  // namespace fastddp
