// One synchronised backward: made new for each, and dropped when it is over, never reset.
//
// Invariants, each with the test that guards it:
// * Every rank launches every bucket of the plan in every round, also those it has no gradient for,
//   then every sparse gradient. Ranks therefore stay in step when they use different parameters or
//   when one of them raises. (tests/parity/test_interrupted_backward.py)
// * `.grad` is empty while its bucket is in flight, so nothing but the collective can touch a
//   launched bucket: a second gradient of the same parameter arrives in fresh memory.
//   (tests/parity/test_gradients.py)
// * A bucket is launched when every round that began before, on the same group, has launched all
//   that it has. (tests/parity/test_two_models.py)
// * On a GPU the host waits for nothing but the flags of parameters that this rank has no gradient
//   for. At the end of a round the stream that called backward is behind all of it. (tests/streams)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/launch_order.h"
#include "core/tracker.h"
#include "reducer/bucket.h"
#include "reducer/buckets.h"
#include "reducer/context.h"
#include "reducer/figures.h"
#include "reducer/fill.h"
#include "reducer/launch.h"
#include "reducer/launchers.h"
#include "reducer/manner.h"
#include "reducer/parameters.h"
#include "tensor/streams.h"

namespace fastddp {

class Round {
 public:
  // The buckets may make way for others while the round lasts, but are kept until the next one.
  Round(const Context& context,
        Parameters& params,
        Buckets& buckets,
        std::shared_ptr<const Launcher> launcher,
        const Filler& filler,
        Figures& figures,
        Turn& turn,
        const Manner& manner);
  Round(const Round&) = delete;
  Round& operator=(const Round&) = delete;

  const Manner& manner() const { return manner_; }
  const Buckets& buckets() const { return buckets_; }
  const std::optional<c10::Stream>& stream() const { return stream_; }  // that it began on
  std::chrono::system_clock::time_point began() const { return began_; }
  double us_since_begin() const { return us_since(begin_); }
  std::uint64_t step() const { return step_; }  // how many rounds have ended before it

  // Takes the gradient that backward has left in `.grad`, and launches what can be.
  void take(std::size_t param);
  // Whether the round has launched its buckets, and has nothing to follow them.
  bool is_all_launched() const;
  // Launches what is left. `waits`: whether the caller goes on to wait for all of it.
  void launch_rest(bool waits);
  // Rank 0's is what the next plan is made from.
  std::vector<std::int64_t> order_of_arrival() const;
  // Waits until all that was launched is reduced, and where gradients are.
  void wait();
  double us_since_launch() const;  // 0 if there was none
  // Makes each `.grad` the reduced slot, or what it was if no rank has a gradient.
  void hand_out();
  // Leaves lazy buckets to the script.
  void leave_buckets();

  // For the collectives that are under way.
  std::size_t num_launched() const { return launches_.size(); }
  std::vector<Wait> waits() const;
  // What is wrong with a gradient, for the end of the round.
  const std::exception_ptr& error() const { return leftovers_.error(); }
  // The parameters that this rank had no gradient for.
  std::vector<std::size_t> unused() const;
  // Whether no rank had a gradient for any parameter. On the CPU, where it is known.
  bool is_empty() const;

 private:
  void take_sparse(std::size_t index, Parameter& param);
  void launch_next();
  void launch(std::size_t bucket, bool waits);
  void launch_sparse(std::size_t param);
  void launch_flags();
  void note_launch();
  Leftover take_leftover(std::size_t param);
  void read_flags();

  const Context& context_;
  Parameters& params_;
  Buckets& buckets_;
  const std::shared_ptr<const Launcher> launcher_;
  const Filler& filler_;
  Figures& figures_;
  Turn& turn_;
  const Manner manner_;
  const std::uint64_t step_;
  std::optional<c10::Stream> stream_;
  ReadyTracker tracker_;
  std::vector<int> taken_;           // by parameter, gradients so far
  std::vector<at::Tensor> aliases_;  // what was in `.grad`, where that is as it was handed out
  std::vector<Filling> fillings_;    // by bucket
  Touched touched_sparse_;           // the sparse gradients
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  const std::chrono::system_clock::time_point began_ = std::chrono::system_clock::now();
  std::optional<std::chrono::steady_clock::time_point> launched_;  // the first collective
  std::vector<std::int64_t> arrival_;
  std::vector<Launch> launches_;  // in the order of launching
  Leftovers leftovers_;
};

}  // namespace fastddp
