// The C++ engine: gradients into buckets, buckets into collectives, while backward goes on.
//
// One synchronised backward is a *round*. Its life:
//   first gradient   -> begin_round(): install the plan if a new one is due, queue finish_round()
//   on the backward each gradient    -> take(): scale it into its slot, empty `.grad`, launch the
//   buckets that are full, in plan order end of backward  -> finish_round(): launch what is left,
//   wait, make each `.grad` the reduced slot backward raised  -> abandon_round(): launch what is
//   left and wait for nothing
//
// Invariants, each with the test that guards it:
// * A round begins when backward reaches an output of forward, or at the first gradient if there is
//   no such output. The former is the same on every rank, whatever parameters it goes on to reach,
//   and is outside of any re-entrant backward. (test_accumulation.py)
// * Every rank launches every bucket of the plan in every round, also those it has no gradient for.
// Ranks therefore
//   stay in step when they use different parameters or when one of them raises.
//   (test_accumulation.py)
// * `.grad` is empty while its bucket is in flight, so nothing but the collective can touch a
// launched bucket: a second
//   gradient of the same parameter arrives in fresh memory. (test_gradients.py)
// * The reducer never owns its process group. Freeing a group joins its threads; doing so from a
// destructor that holds
//   the GIL deadlocks. (test_launch.py)
// * Memory is allocated at the head of a round only, and only when the plan is new.
//
// `fastddp/engine/python.py` is this file's specification: same collectives, same bits.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/plan.h"
#include "core/tracker.h"

namespace fastddp {

// Host-side figures of the rounds so far. Waiting is only seen by the host for collectives on the
// CPU.
struct Stats {
  std::int64_t rounds = 0;
  double wait_us_total = 0;  // spent at the end of backward until the last bucket was reduced
  double wait_us_last = 0;
  std::int64_t bytes_per_round = 0;
  std::int64_t num_buckets = 0;
};

class Reducer final : public std::enable_shared_from_this<Reducer> {
 public:
  // `params` all require grad, are dense, on one device; `names` are theirs, for messages.
  Reducer(std::vector<at::Tensor> params,
          std::vector<std::string> names,
          const c10::intrusive_ptr<c10d::ProcessGroup>& group,
          std::vector<std::int64_t> caps_bytes);

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

  Stats stats() const;
  std::vector<BucketPlan> plan() const;

 private:
  friend struct GradientHook;
  friend struct RoundEnd;
  // Named by the compiler: torch has changed the smart pointer's type before.
  using NodePtr =
      decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));

  struct Param {
    at::Tensor variable;
    std::string name;
    DType dtype;
    NodePtr accumulator;  // the tensor itself holds only a weak reference
    std::uintptr_t hook = 0;
    std::size_t bucket = 0;
    at::Tensor slot;  // where its reduced gradient lies, shaped and strided like the parameter
    bool accumulated = false;  // holds local gradients of backwards that were not synchronised
    int expected = 1;          // gradients per round: the most that there have been
  };

  struct Bucket {
    at::Tensor flat;
    at::Tensor flags;
  };

  // A gradient that the round's own backward did not produce, as it was before the round.
  struct Bystander {
    std::size_t param;
    at::Tensor grad;  // undefined when there was none
    at::Tensor flag;  // this slot's element of the bucket's flags
  };

  struct Round {
    explicit Round(const std::vector<BucketPlan>& plan, std::size_t num_params)
        : tracker(plan), taken(num_params, 0) {}
    ReadyTracker tracker;
    std::vector<int> taken;  // by parameter, gradients so far
    std::vector<std::int64_t> arrival;
    std::vector<c10::intrusive_ptr<c10d::Work>> works;  // by bucket
    std::vector<Bystander> bystanders;
  };

  // The arrival order of the first round, on its way from rank 0 to all.
  struct Agreement {
    std::vector<at::Tensor> order;
    c10::intrusive_ptr<c10d::Work> work;
  };

  void on_backward();
  void on_gradient(std::size_t param);
  void finish_round();
  void abandon_round() noexcept;

  void begin_round();
  void install_plan();
  void take(std::size_t param);
  void launch(std::size_t bucket);
  void flush();
  void add_bystander(std::size_t param, const at::Tensor& flag);
  void agree_on_order();
  void wait_for(std::size_t bucket);
  void hand_out();
  at::Tensor allocate(std::int64_t numel, at::ScalarType dtype) const;
  at::Tensor make_slot(const Param& param, const at::Tensor& flat, const SlotPlan& slot) const;
  c10::intrusive_ptr<c10d::ProcessGroup> group() const;
  std::string describe(std::size_t bucket) const;

  // Fixed for the reducer's life.
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> group_;
  const int rank_;
  const double scale_;
  const std::vector<std::int64_t> caps_bytes_;
  std::vector<ParamSpec> specs_;

  std::atomic<bool> sync_{true};

  mutable std::mutex mutex_;  // guards all below
  std::vector<Param> params_;
  std::vector<BucketPlan> plan_;
  std::vector<Bucket> buckets_;  // empty until the plan is installed
  std::optional<Agreement> agreement_;
  bool order_is_learned_ = false;
  Stats stats_;
  std::unique_ptr<Round> round_;  // null between rounds
};

}  // namespace fastddp
