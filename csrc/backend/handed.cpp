#include "backend/handed.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <exception>

#include "backend/errors.h"
#include "backend/handed_work.h"
#include "backend/lane.h"
#include "backend/refusals.h"
#include "core/deadline.h"
#include "shm/label.h"
#include "tensor/error_text.h"

namespace fastddp {
namespace {

bool is_reduction(shm::Kind kind) {
  return kind == shm::Kind::kAllReduce || kind == shm::Kind::kReduceScatter ||
         kind == shm::Kind::kReduce;
}

at::Tensor bytes_of(const std::string& text) {
  const auto bytes = at::empty({static_cast<std::int64_t>(text.size())}, at::kByte);
  std::copy(text.begin(), text.end(), bytes.data_ptr<std::uint8_t>());
  return bytes;
}

std::string text_in(const at::Tensor& bytes) {
  const auto* const data = bytes.const_data_ptr<std::uint8_t>();
  return {data, data + bytes.numel()};
}

std::vector<std::string> texts_in(const std::vector<at::Tensor>& all) {
  std::vector<std::string> texts;
  for (const at::Tensor& bytes : all) texts.push_back(text_in(bytes));
  return texts;
}

}  // namespace

HandedCollectives::HandedCollectives(int rank,
                                     int size,
                                     Starter& starter,
                                     Connections& connections,
                                     std::shared_ptr<shm::Group> group,
                                     shm::Collectives& collectives)
    : rank_(rank),
      size_(size),
      starter_(starter),
      connections_(connections),
      group_(std::move(group)),
      collectives_(collectives) {}

HandedCollectives::Work HandedCollectives::start(HandedCall call,
                                                 std::chrono::milliseconds timeout,
                                                 bool async,
                                                 Call launch) {
  starter_.refuse_overlaps(call.title, call.results);
  call.what.label = static_cast<std::int64_t>(shm::Label::current());
  Request wanted{call.type, call.title, call.results, timeout, async};
  return starter_.start(std::move(wanted), [this, call = std::move(call),
                                            launch = std::move(launch)](shm::Deadline deadline) {
    const shm::Ending ending(*group_);
    compare(call, deadline);
    Stand stand(!is_reduction(call.kind));  // gloo moves no complex numbers
    const Work work = launch_together(launch, stand, deadline);
    wait_for(work, deadline);
    stand.give_back();
  });
}

// Throws unless all ranks have called the same.
void HandedCollectives::compare(const HandedCall& call, shm::Deadline deadline) {
  const auto count = static_cast<std::size_t>(size_);
  Particulars what = call.what;
  std::vector<std::string> everyones;
  if (spans_hosts()) {
    collectives_.announce(call.kind, static_cast<int>(call.root), deadline);
    what.number = static_cast<std::int64_t>(group_->count());
    everyones = exchange_across(what.packed(count), deadline);
  } else {
    collectives_.begin_elsewhere(call.kind, static_cast<int>(call.root), deadline);
    everyones = collectives_.exchange(what.packed(count));
  }
  std::vector<Particulars> all;
  for (const std::string& one : everyones) all.push_back(Particulars::unpacked(one, count));
  const std::string difference = difference_between(all);
  if (!difference.empty()) group_->fail("the ranks do not agree: " + difference);
}

// Returns what all ranks of all hosts gave, who all gave as many bytes.
std::vector<std::string> HandedCollectives::exchange_across(const std::string& mine,
                                                            shm::Deadline deadline) {
  Tensors inputs{bytes_of(mine)};
  std::vector<Tensors> outputs(1);
  for (int i = 0; i < size_; ++i) outputs[0].push_back(at::empty_like(inputs[0]));
  HandedWork(connections_.inner()->allgather(outputs, inputs, {}), group_,
             group_->describe_current())
      .wait(time_left(deadline));
  return texts_in(outputs[0]);
}

// Has the ranks tell each other whether the inner backend has accepted the call: where it refuses
// on one of them alone, the others would wait for that one.
HandedCollectives::Work HandedCollectives::launch_together(const Call& launch,
                                                           Stand& stand,
                                                           shm::Deadline deadline) {
  Work work;
  std::exception_ptr error;
  Refusals refusals{.by_all = false};
  try {
    work = launch(stand);
  } catch (const std::exception& thrown) {
    error = std::current_exception();
    refusals = {true, "rank " + std::to_string(rank_) + " failed: " + text_of(thrown)};
  }
  refusals = Refusals::sum_of(collectives_.exchange(refusals.packed()));
  if (spans_hosts()) {
    // The first rank of each host asks the other hosts, and tells its own.
    std::vector<std::string> hosts{refusals.packed()};
    if (group_->me() == 0) {
      Lane lane(connections_.lanes(), *group_, deadline);
      hosts = texts_in(lane.gather(bytes_of(hosts[0])));
    }
    refusals = Refusals::unpacked(collectives_.exchange(Refusals::sum_of(hosts).packed())[0]);
  }
  if (error && refusals.by_all) throw RefusedByAll{error};
  if (error) std::rethrow_exception(error);
  if (!refusals.first.empty()) group_->fail(refusals.first);
  return work;
}

void HandedCollectives::wait_for(const Work& work, shm::Deadline deadline) {
  try {
    HandedWork(work, group_, group_->describe_current()).wait(time_left(deadline));
  } catch (const c10::DistError&) {
    throw;
  } catch (const c10::Error&) {
    // It refuses a dtype or an operation before it sends anything, and the ranks agree on those.
    throw RefusedByAll{std::current_exception()};
  }
}

}  // namespace fastddp
