// Reads the marks of a round: whether the ranks have added up the buckets of different models, and
// whether the model of a rank has changed.
//
// Invariants, each with the test that guards it:
// * Buckets of two models are never added up without an error. (tests/parity/test_two_models.py)
// * The host does not wait for a device to read marks, unless this rank has news itself: the next
//   round, or one after it, finds them on the host. (tests/streams)
// * A rank whose backward has raised looks at the marks of the round that it has left before its
//   next forward. (tests/parity/test_changed_models.py)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "core/launch_order.h"
#include "reducer/bucket.h"
#include "reducer/buckets.h"
#include "reducer/context.h"
#include "reducer/launch.h"
#include "reducer/parameters.h"

namespace fastddp {

class MarkReader {
 public:
  // `order` has the titles of the models on the group, for messages.
  MarkReader(const Context& context, const Parameters& params, const LaunchOrder& order)
      : context_(context), params_(params), order_(order) {}

  // The round is over. Returns whether the model of any rank has changed, as far as the host knows
  // it by now. Throws if the ranks have added up different buckets.
  bool read(const Buckets& buckets);
  // What read() could not know on a device yet. `waits`: until it is all known.
  bool take_late(bool waits);

  // A round that its backward has left by an exception: the marks are known when its collectives
  // have ended.
  void leave(std::vector<Wait> waits, const Buckets& buckets);
  // Has the next read_left_news() say that a model has changed.
  void leave_news();
  bool has_left_news() const { return left_.has_value(); }
  // Whether such a round has brought the news that a model has changed. Waits for its collectives.
  bool read_left_news();

 private:
  struct RoundMarks {
    std::shared_ptr<const Plan> plan;
    std::vector<Marked> marked;
  };

  // Marks on their way from a device to the host, which goes on meanwhile.
  struct LateMarks {
    at::Tensor rows;
    RoundMarks marks;  // by row; the tensors are those of the device
    c10::Event done;
  };

  // What there is to know of a round that its backward has left by an exception.
  struct Left {
    std::vector<Wait> waits;
    RoundMarks marks;
    bool has_changed;
  };

  bool check(const RoundMarks& marks) const;

  const Context& context_;
  const Parameters& params_;
  const LaunchOrder& order_;
  std::deque<LateMarks> late_;
  std::optional<Left> left_;
};

}  // namespace fastddp
