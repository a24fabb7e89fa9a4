#include "reducer/former.h"

#include <exception>
#include <iterator>
#include <utility>

#include "tensor/streams.h"

namespace fastddp {

void Former::keep(std::unique_ptr<Buckets> buckets, std::vector<Wait> waits) {
  if (buckets) buckets_.push_back(std::move(buckets));
  if (has_streams(device_)) std::move(waits.begin(), waits.end(), std::back_inserter(abandoned_));
}

void Former::settle() {
  for (const Wait& wait : std::exchange(abandoned_, {})) {
    try {
      wait();
    } catch (const std::exception&) {  // of a backward that raised anyway
    }
  }
  drain_current_stream(device_);  // whatever stream the old buckets were used on
}

void Former::release() {
  for (std::unique_ptr<Buckets>& buckets : std::exchange(buckets_, {})) {
    if (buckets->is_captured()) of_graphs_.push_back(std::move(buckets));
  }
}

}  // namespace fastddp
