#include "reducer/agreements.h"

#include <ATen/ATen.h>

#include <exception>
#include <utility>

#include "core/slow_wait.h"
#include "tensor/error_text.h"

namespace fastddp {

void Agreements::start_with_order(const std::vector<std::int64_t>& order) {
  Exchange exchange;
  exchange.tensors = {at::tensor(order, at::kLong).to(context_.device)};
  exchange.work = context_.group.broadcast(exchange.tensors);
  order_ = std::move(exchange);
  order_is_learned_ = true;
}

std::optional<std::vector<std::int64_t>> Agreements::await_order() {
  if (!order_) return std::nullopt;
  const at::Tensor order = take(order_, "the broadcast of the order in which gradients arrive");
  const auto* begin = order.const_data_ptr<std::int64_t>();
  return std::vector<std::int64_t>(begin, begin + order.numel());
}

void Agreements::start_with_schedule() {
  Exchange exchange;
  exchange.tensors = {at::tensor({schedule.early_us(), schedule.late_us()}, at::kDouble)};
  exchange.work = context_.group.all_reduce(exchange.tensors);
  times_ = std::move(exchange);
}

void Agreements::await_schedule() {
  if (!times_) return;
  const at::Tensor sums = take(times_, "the all-reduce of the times of rounds");
  const auto* sum = sums.const_data_ptr<double>();
  schedule.decide(sum[0], sum[1]);
}

at::Tensor Agreements::take(std::optional<Exchange>& exchange, const char* what) const {
  try {
    context_.group.wait_for(*exchange->work, what);
  } catch (const Interruption&) {
    throw;
  } catch (const std::exception& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "fastddp: rank ", context_.rank(), ": ", what,
                     " failed: ", text_of(error));
  }
  const at::Tensor result = exchange->tensors.front().cpu();
  exchange.reset();
  return result;
}

}  // namespace fastddp
