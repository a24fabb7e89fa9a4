// The C++ engine: gradients into buckets, buckets into collectives, while backward goes on.
//
// One synchronised backward is a *round* (round.h). Its life:
//   first gradient     -> begin_round(): install the plan if a new one is due, queue end_backward()
//                         on the backward
//   each gradient      -> Round::take(): scale it into its bucket (fill.h), empty `.grad`, launch
//                         the buckets that are full (launchers.h), in plan order, unless the
//                         round's schedule has them wait. On a GPU it is only put by, and one
//                         kernel flattens the bucket once it is full
//   end of backward    -> finish_round(): launch what is left, wait, make each `.grad` the reduced
//                         slot
//   backward raised    -> abandon_round(): launch what is left and wait for nothing but hooks. On a
//                         GPU a thread of autograd's may do it while the caller goes on: settle()
//   a manual round     -> the end of backward launches what is left and leaves it in flight;
//                         finalize(), which the script calls, does the rest. Called before backward
//                         is over it does all of it
//
// This file has what the script and autograd call. The files beside it have the parts, with their
// invariants on top: the parameters and their places, the installed buckets, one round, what the
// ranks agree on between rounds, the marks, the figures.
//
// Invariants of the whole, each with the test that guards it:
// * A round begins when backward reaches an output of forward, or at the first gradient if there is
//   no such output. The former is the same on every rank, whatever parameters it goes on to reach,
//   and is outside of any re-entrant backward. (tests/parity/test_checkpointing.py)
// * A reducer whose model has changed is retired: it takes part in rounds with nothing to add, and
//   tells the other ranks by the marks of its buckets, until another takes its place.
//   (tests/parity/test_changed_models.py)
// * Whoever waits for the mutex does not hold the GIL: a hook takes the GIL under the mutex. What
//   others ask for at any time, stats() and the like, is not under the mutex: it is held while a
//   round waits. (tests/parity/test_questions.py)
// * No round is begun over another: phases move as core/phase.h says. (tests/cpp/core_test.cpp)
//
// The folder `fastddp/engine/python` is this one's specification, file by file: same collectives,
// same bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/board.h"
#include "core/launch_order.h"
#include "core/phase.h"
#include "core/plan.h"
#include "reducer/agreements.h"
#include "reducer/buckets.h"
#include "reducer/context.h"
#include "reducer/figures.h"
#include "reducer/fill.h"
#include "reducer/installation.h"
#include "reducer/launch.h"
#include "reducer/launchers.h"
#include "reducer/manner.h"
#include "reducer/mark_reader.h"
#include "reducer/parameters.h"
#include "reducer/round.h"

namespace fastddp {

// Why a reducer calls back, beside the end of a round; see fastddp/engine/news.py.
enum class News { kEmpty, kChanged, kChangedBefore };

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
  bool is_in_flight() const { return phase_.is(Phase::kInFlight); }
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
  Stats stats() const { return figures_.stats(); }
  std::vector<BucketPlan> plan() const { return figures_.plan(); }
  // The names of the parameters that no rank had a gradient for in the first round.
  std::vector<std::string> unused() const { return figures_.unused(); }
  // What the latest error in a backward said; empty if there was none.
  std::string error() const { return figures_.error(); }
  // By parameter, how many ranks had a gradient for it in the latest round; not in a round.
  std::vector<std::int64_t> used_by() const;
  // Whether a parameter that was frozen requires grad now, so that another reducer is needed.
  bool outgrown() const;

 private:
  friend struct GradientHook;
  friend struct RoundEnd;

  // Autograd's doors.
  void on_backward();
  void on_gradient(std::size_t param);
  void end_backward();
  void abandon_round() noexcept;

  void begin_backward();
  void begin_round(Gives gives);
  void check_capture() const;
  void read_news(Gives gives);
  Buckets& install(bool is_captured);
  void leave_in_flight();
  void launch_rest(bool waits);
  void finalize_round();
  void finish_round(Phase then = Phase::kBetween);
  void drop_round(Phase then = Phase::kBetween);
  void end_round(Phase then);
  void move_to(Phase phase);
  void await_agreements();
  void replan(const std::vector<std::int64_t>& order);
  void announce_change();
  void check_params();
  bool is_timing_due() const {
    return launcher_->may_launch_late() && agreements_.schedule.is_due();
  }

  // Fixed for the reducer's life.
  const Context context_;
  const std::vector<at::Tensor> frozen_;
  const std::shared_ptr<LaunchOrder> order_in_group_;  // shared by the reducers on one group

  std::atomic<bool> sync_{true};
  std::atomic<bool> manual_{false};
  std::atomic<std::int64_t> began_ns_{0};
  CurrentPhase phase_;
  Figures figures_;

  // Guards all below. Recursive: what is called at the end of a round may go on to close() or
  // average().
  mutable std::recursive_mutex mutex_;
  Parameters params_;
  const std::unique_ptr<const Filler> filler_;
  std::shared_ptr<const Launcher> launcher_;
  double divisor_;
  std::function<void()> after_round_;
  std::function<void(News)> on_news_;
  Agreements agreements_;
  MarkReader mark_reader_;
  bool closed_ = false;
  bool is_checked_ = false;  // for parameters that are stale, since the latest round
  double latest_scale_ = 1;  // of the latest round's gradients, and of its flags in a fused pass
  bool counts_are_learned_ = false;  // a round has ended well on this rank
  Installation installation_;
  Turn turn_;
  board::ModelPlace on_board_;
  std::unique_ptr<Round> round_;  // while the phase is kFilling or kInFlight, else null
};

}  // namespace fastddp
