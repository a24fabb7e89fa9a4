// The order in which the models on one group launch their collectives.
//
// Rounds begin in the same order on every rank, when backward reaches the outputs of the models'
// forwards; buckets fill in an order that depends on which parameters a rank uses. So the buckets
// of a round wait until every round that began before it on the same group has launched all its
// buckets. Otherwise one rank's bucket of one model would be added to another rank's bucket of
// another model. A rank that misses no gradient waits for nothing.
// `fastddp/engine/launch_order.py` is the same class in Python. (tests/parity/test_two_models.py)
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace fastddp {

// The rounds of one group that have collectives to launch, in the order in which they began.
class LaunchOrder {
 public:
  // Registers a model on the group.
  void introduce(std::uint32_t owner, const std::string& title) {
    const std::lock_guard lock(mutex_);
    titles_[owner] = title;
  }

  // Returns the names of the other models on the group.
  std::string others(std::uint32_t owner) const {
    const std::lock_guard lock(mutex_);
    std::string text;
    for (const auto& [other, title] : titles_) {
      if (other != owner) text += (text.empty() ? "" : ", ") + title;
    }
    return text;
  }

  // Adds a round that begins; a reducer has one round at a time.
  void begin(const void* reducer) {
    const std::lock_guard lock(mutex_);
    open_.push_back(reducer);
  }

  // Whether all rounds that began before this one have launched all their buckets.
  bool may_launch(const void* reducer) const {
    const std::lock_guard lock(mutex_);
    return open_.empty() || open_.front() == reducer;
  }

  // Removes a round that has launched all its buckets; a second call does nothing.
  void end(const void* reducer) {
    const std::lock_guard lock(mutex_);
    open_.erase(std::remove(open_.begin(), open_.end(), reducer), open_.end());
  }

 private:
  mutable std::mutex mutex_;
  std::vector<const void*> open_;
  std::map<std::uint32_t, std::string> titles_;
};

// The place that one reducer has in the order, in each of its rounds.
class Turn {
 public:
  explicit Turn(std::shared_ptr<LaunchOrder> order) : order_(std::move(order)) {}
  ~Turn() { end(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  // A round of the reducer begins.
  void begin() { order_->begin(this); }
  // Whether the round may launch.
  bool has_come() const { return order_->may_launch(this); }
  // The round has launched all that it has; once more does nothing.
  void end() { order_->end(this); }

 private:
  const std::shared_ptr<LaunchOrder> order_;
};

}  // namespace fastddp
