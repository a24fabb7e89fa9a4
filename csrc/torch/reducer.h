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
// * Memory is allocated at the head of a round only, and only when the plan is new. (Tables of a
//   fused pass are kernel arguments, so a CUDA graph can hold a round.)
// * On a GPU whatever touches a bucket waits for the streams that have touched it before, by
//   events; the host waits for nothing but the flags of parameters that this rank has no gradient
//   for. At the end of a round the stream that called backward is behind all of it.
//   (tests/streams)
// * Whoever waits for the mutex does not hold the GIL: a hook takes the GIL under the mutex.
//
// `fastddp/engine/python.py` is this file's specification: same collectives, same bits.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/plan.h"
#include "core/schedule.h"
#include "core/tracker.h"
#include "torch/flatten.h"
#include "torch/streams.h"

namespace fastddp {

// Host-side figures of the rounds so far. Waiting is only seen by the host for collectives on the
// CPU.
struct Stats {
  std::int64_t rounds = 0;
  double wait_us_total = 0;  // spent at the end of backward until the last bucket was reduced
  double wait_us_last = 0;
  std::int64_t bytes_per_round = 0;
  std::int64_t num_buckets = 0;
  bool overlaps = true;  // whether the latest round launched buckets while backward went on
};

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
  // the CPU.
  Reducer(std::vector<at::Tensor> params,
          std::vector<std::string> names,
          std::size_t num_sparse,
          std::vector<at::Tensor> frozen,
          const c10::intrusive_ptr<c10d::ProcessGroup>& group,
          std::vector<std::int64_t> caps_bytes,
          std::optional<at::ScalarType> comm_dtype,
          std::optional<bool> flattens);

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
  // What gradients are divided by, from the next round on: the number of ranks unless told.
  void set_divisor(double divisor);
  // Hands the gradients to `hook` from the next round on, in place of the all-reduce.
  void set_hook(Hook hook);
  // Has `callback` called at the end of each round, once gradients are where they belong.
  void set_after_round(std::function<void()> callback);
  // Takes part in a round of the other ranks with nothing to add.
  void shadow();
  // Waits for another thread to end a round that its backward has left by an exception. Returns
  // whether it has; after 10 s it gives up, for a thread may as well run a long backward.
  bool settle() const;

  Stats stats() const;
  std::vector<BucketPlan> plan() const;
  // The names of the parameters that no rank had a gradient for in the first round.
  std::vector<std::string> unused() const;
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
    at::Tensor flat;  // what the slots are in
    at::Tensor wire;  // what is reduced: `flat` itself unless there is a dtype for communication
    at::Tensor
        flags;        // in its tail, so that they need no collective; or in those of `loose_flags_`
    at::Tensor ones;  // one per slot, to set flags from in the fused pass
  };

  // A gradient that waits for the fused pass over its bucket.
  struct Pending {
    std::size_t param;
    at::Tensor grad;
    c10::Stream stream;
  };

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
    Round(const std::vector<BucketPlan>& plan, std::size_t num_params, bool is_shadow)
        : is_shadow(is_shadow), tracker(plan), taken(num_params, 0), fillings(plan.size()) {}
    const bool is_shadow;               // of a round of the other ranks
    std::optional<c10::Stream> stream;  // that it began on
    ReadyTracker tracker;
    std::vector<int> taken;         // by parameter, gradients so far
    std::vector<Filling> fillings;  // by bucket
    Touched touched_sparse;         // the sparse gradients
    bool is_early = true;           // buckets are launched as they fill
    const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    std::vector<std::int64_t> arrival;
    std::vector<Wait> waits;  // in the order of launching
    std::vector<Bystander> bystanders;
  };

  // What the ranks agree on between two rounds: from the end of one to the head of the next.
  struct Agreement {
    std::vector<at::Tensor> tensors;
    c10::intrusive_ptr<c10d::Work> work;
  };

  void on_backward();
  void on_gradient(std::size_t param);
  void finish_round();
  void abandon_round() noexcept;

  void begin_round(bool is_shadow);
  void end_round();
  void drop_round();
  void queue_end();
  void install_plan();
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
  Wait start_all_reduce(at::Tensor tensor, bool waits = false) const;
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
  void cast_back(std::size_t bucket);
  void replan(const std::vector<std::int64_t>& order);
  at::Tensor allocate(std::int64_t numel, at::ScalarType dtype) const;
  at::ScalarType wire_dtype(at::ScalarType dtype) const;
  c10::intrusive_ptr<c10d::ProcessGroup> group() const;
  std::string describe(std::size_t launch) const;
  std::size_t num_dense() const { return specs_.size(); }
  // With a hook, gradients go to it as they are.
  double scale() const { return hook_ ? 1.0 : 1.0 / divisor_; }

  // Fixed for the reducer's life.
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> group_;
  const int rank_;
  const std::vector<std::int64_t> caps_bytes_;
  const std::vector<at::Tensor> frozen_;
  const c10::Device device_;
  const std::optional<at::ScalarType> comm_dtype_;
  const bool flattens_;
  // Whether a collective that is waited for at once costs no switch of threads.
  const bool runs_inline_;
  std::vector<ParamSpec> specs_;  // of the dense parameters, which come first

  std::atomic<bool> sync_{true};
  std::atomic<bool> is_in_round_{false};  // what round_ says, to those who do not have the mutex

  // Guards all below. Recursive: a hook may ask for stats() or plan().
  mutable std::recursive_mutex mutex_;
  std::vector<Param> params_;
  double divisor_;
  Hook hook_;
  std::function<void()> after_round_;
  std::vector<BucketPlan> plan_;
  bool closed_ = false;
  bool installed_ = false;  // whether the next three are the plan's
  std::vector<Bucket> buckets_;
  std::optional<c10::Stream> home_;  // that they were allocated on
  bool captured_ = false;            // whether a graph refers to them
  std::vector<Bucket> of_graphs_;    // former buckets that graphs refer to
  std::vector<Wait> abandoned_;      // for collectives that may still write to them
  at::Tensor loose_flags_;           // those that travel in no bucket; undefined if there are none
  std::optional<Agreement> order_;   // of arrival in the first round, from rank 0
  bool order_is_learned_ = false;
  bool counts_are_learned_ = false;  // a round has ended well on this rank
  Schedule schedule_;                // of the plan
  std::optional<Agreement> timing_;  // the ranks' times, on their way
  Stats stats_;
  std::vector<std::string> unused_;
  std::unique_ptr<Round> round_;  // null between rounds
};

}  // namespace fastddp
