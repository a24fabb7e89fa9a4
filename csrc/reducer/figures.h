// The statistics of the rounds so far, and what else others may ask a reducer at any time.
//
// Invariant: nobody who asks waits for a round. A round holds the reducer's mutex while it waits
// for other ranks, so what is asked for lies behind a mutex of its own, which is held to copy it
// only. (tests/parity/test_questions.py)
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/events.h"
#include "core/plan.h"
#include "core/slow_wait.h"
#include "tensor/error_text.h"

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

class Figures {
 public:
  // `owner` is the number of the model.
  explicit Figures(std::uint32_t owner) : owner_(owner) {}

  // ---- at any time, from any thread ----

  Stats stats() const;
  std::vector<BucketPlan> plan() const;
  // The names of the parameters that no rank had a gradient for in the first round.
  std::vector<std::string> unused() const;
  // What the latest error in a backward, or in finalize(), said; empty if there was none.
  std::string error() const;

  void set_plan(const std::vector<BucketPlan>& plan);
  void add_unused(const std::string& name);
  void set_error(std::string text);

  // Runs an entry from autograd or from the script, and keeps the text of what it throws.
  template <typename Entry>
  void noting_errors(Entry entry) {
    try {
      entry();
    } catch (const Interruption&) {  // not an error of the model's
      events::record(events::Kind::kError, owner_);
      throw;
    } catch (const std::exception& error) {
      events::record(events::Kind::kError, owner_);
      set_error(text_of(error));  // the text may take the GIL, so it is made before any lock
      throw;
    }
  }

  // ---- under the reducer's mutex ----

  // The figures as the round under way has changed them; others see them once they are published.
  Stats& now() { return now_; }
  const Stats& now() const { return now_; }
  void publish();
  // Compares the parameters that this rank did not use with those of the round before. `bytes_of`
  // gives the bytes of a parameter.
  void note_unused(std::vector<std::size_t> params,
                   const std::function<std::size_t(std::size_t)>& bytes_of);

 private:
  // What others see: as it was at the latest turn of events.
  struct Report {
    Stats stats;
    std::vector<BucketPlan> plan;
    std::vector<std::string> unused;
    std::string error;
  };

  const std::uint32_t owner_;
  mutable std::mutex mutex_;
  Report report_;

  Stats now_;
  std::optional<std::vector<std::size_t>> unused_last_;  // by this rank, in the latest round
};

inline double us_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace fastddp
