// Which plan is installed: the one that the ranks have agreed on last, in memory that is free.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "reducer/bucket.h"
#include "reducer/buckets.h"
#include "reducer/context.h"
#include "reducer/former.h"
#include "reducer/launch.h"
#include "reducer/parameters.h"

namespace fastddp {

// The plan of a reducer, and its buckets from one round to the next.
class Installation {
 public:
  // `caps_bytes` are those of plan_buckets(); `is_fused` is that of Buckets.
  Installation(const Context& context,
               Parameters& params,
               std::vector<std::int64_t> caps_bytes,
               bool is_fused);

  const Plan& plan() const { return *plan_; }
  // The plan's buckets; null until they are installed.
  Buckets* buckets() const { return buckets_.get(); }

  // Plans anew, with gradients that arrive in this order. Returns whether the plan is another now.
  bool replan(const std::vector<std::int64_t>& order, const Form& form);
  // The dense parameters as the plan has them.
  std::vector<std::int64_t> order() const;
  // Allocates the plan's buckets.
  Buckets& install(const Form& form);
  // Has the next round begin with buckets of its own. `waits` are for the collectives that may
  // still write to these.
  void uninstall(std::vector<Wait> waits = {});

 private:
  const Context& context_;
  Parameters& params_;
  const std::vector<std::int64_t> caps_bytes_;
  const bool is_fused_;
  std::shared_ptr<const Plan> plan_;
  std::unique_ptr<Buckets> buckets_;
  Former former_;
};

}  // namespace fastddp
