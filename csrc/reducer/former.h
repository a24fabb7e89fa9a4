// Memory that no round uses any more, and that something else may still write to.
//
// Invariant: memory that a graph refers to, or that a collective of an abandoned round may still
// write to, is kept. (tests/streams/test_capture.py, tests/streams/test_abandoned_rounds.py)
#pragma once

#include <c10/core/Device.h>

#include <memory>
#include <vector>

#include "reducer/buckets.h"
#include "reducer/launch.h"

namespace fastddp {

// Buckets that are not installed any more, until it is safe to drop them.
class Former {
 public:
  explicit Former(c10::Device device) : device_(device) {}

  // Keeps buckets until release(). `waits` are for collectives that may still write to them. On a
  // GPU memory is free for others as soon as it is dropped here, so these are waited for then; on
  // the CPU the transport holds what it writes to.
  void keep(std::unique_ptr<Buckets> buckets, std::vector<Wait> waits);
  // Waits until nothing uses them any more; to be called before release().
  void settle();
  // Frees the buckets before new ones are allocated, unless a graph refers to them.
  void release();

 private:
  const c10::Device device_;
  std::vector<std::unique_ptr<Buckets>> buckets_;
  std::vector<std::unique_ptr<Buckets>> of_graphs_;  // a graph goes on to write to these
  std::vector<Wait> abandoned_;                      // for collectives that may still write to some
};

}  // namespace fastddp
