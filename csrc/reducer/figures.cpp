#include "reducer/figures.h"

#include <algorithm>

namespace fastddp {

Stats Figures::stats() const {
  const std::lock_guard lock(mutex_);
  return report_.stats;
}

std::vector<BucketPlan> Figures::plan() const {
  const std::lock_guard lock(mutex_);
  return report_.plan;
}

std::vector<std::string> Figures::unused() const {
  const std::lock_guard lock(mutex_);
  return report_.unused;
}

std::string Figures::error() const {
  const std::lock_guard lock(mutex_);
  return report_.error;
}

void Figures::set_plan(const std::vector<BucketPlan>& plan) {
  const std::lock_guard lock(mutex_);
  report_.plan = plan;
}

void Figures::add_unused(const std::string& name) {
  const std::lock_guard lock(mutex_);
  report_.unused.push_back(name);
}

void Figures::set_error(std::string text) {
  const std::lock_guard lock(mutex_);
  report_.error = std::move(text);
}

void Figures::publish() {
  const std::lock_guard lock(mutex_);
  report_.stats = now_;
}

void Figures::note_unused(std::vector<std::size_t> params,
                          const std::function<std::size_t(std::size_t)>& bytes_of) {
  std::sort(params.begin(), params.end());
  if (params == unused_last_) return;
  now_.is_static = now_.is_static && !unused_last_;
  now_.unused_bytes_last = 0;
  for (const std::size_t param : params)
    now_.unused_bytes_last += static_cast<std::int64_t>(bytes_of(param));
  unused_last_ = std::move(params);
}

}  // namespace fastddp
