#include "backend/lane.h"

#include <ATen/ops/empty_like.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>

#include "core/deadline.h"
#include "core/slow_wait.h"
#include "shm/error.h"
#include "tensor/error_text.h"
#include "tensor/patience.h"

namespace fastddp {

template <typename Options, typename Launch>
Lane::Work Lane::launched(const Launch& launch) {
  Options options;
  options.timeout = time_left(deadline_);
  try {
    return launch(options);
  } catch (const std::exception& error) {
    fail(error);
  }
}

std::vector<at::Tensor> Lane::gather(const at::Tensor& mine) {
  std::vector<at::Tensor> inputs{mine};
  std::vector<std::vector<at::Tensor>> outputs(1);
  for (std::size_t i = 0; i < ranks().size(); ++i) outputs[0].push_back(at::empty_like(mine));
  await(*launched<c10d::AllgatherOptions>([&](const c10d::AllgatherOptions& options) {
    return lanes_.backend->allgather(outputs, inputs, options);
  }));
  return std::move(outputs[0]);
}

Lane::Work Lane::all_reduce(const at::Tensor& part, c10d::ReduceOp::RedOpType op) {
  std::vector<at::Tensor> parts{part};
  return launched<c10d::AllreduceOptions>([&](c10d::AllreduceOptions options) {
    options.reduceOp = op;
    return lanes_.backend->allreduce(parts, options);
  });
}

void Lane::await(c10d::Work& work) {
  std::optional<SlowWait> slow;
  try {
    wait_looking_around(work, [&](std::chrono::nanoseconds lasted) {
      // If another rank here breaks the group, what this waits for may never arrive.
      group_.check_current();
      if (!slow) slow.emplace(group_.what(), group_.describe_current() + ", between hosts", lasted);
      slow->look();
    });
  } catch (const Interruption&) {
    throw;
  } catch (const shm::Error&) {
    throw;
  } catch (const WaitFailed& error) {
    group_.fail(error.what());
  } catch (const std::exception& error) {
    fail(error);
  }
}

void Lane::fail(const std::exception& error) {
  std::string names;
  for (const int rank : ranks()) names += (names.empty() ? "" : ", ") + std::to_string(rank);
  group_.fail("between hosts, among ranks " + names + ": " + text_of(error));
}

}  // namespace fastddp
