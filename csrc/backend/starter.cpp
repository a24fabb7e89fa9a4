#include <Python.h>  // first, says its manual

#include "backend/starter.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <utility>

#include "backend/errors.h"
#include "backend/plain.h"
#include "backend/turn_work.h"
#include "core/board.h"
#include "core/deadline.h"
#include "core/slow_wait.h"
#include "shm/error.h"
#include "shm/label.h"
#include "tensor/error_text.h"

namespace fastddp {

Starter::Starter(
    int rank, int size, Connections& connections, shm::Group& group, shm::Collectives& collectives)
    : rank_(rank),
      size_(size),
      connections_(connections),
      group_(group),
      collectives_(collectives) {}

// ---- a collective ----------------------------------------------------------------------

c10::intrusive_ptr<c10d::Work> Starter::start(Request request, Body body) {
  check_usable();
  count_.fetch_add(1, std::memory_order_relaxed);
  board::note_issuer();
  const auto timeout =
      request.timeout == c10d::kUnsetTimeout ? connections_.timeout() : request.timeout;
  // Inference tensors may be written to in inference mode only, which is a thread's own.
  const bool inference =
      c10::InferenceMode::is_enabled() ||
      std::any_of(request.results.begin(), request.results.end(), [](const at::Tensor& tensor) {
        return tensor.defined() && tensor.is_inference();
      });
  Turns::Body turn = [this, timeout, inference, label = shm::Label::current(),
                      body = std::move(body)] {
    std::optional<c10::InferenceMode> inference_mode;
    if (inference) inference_mode.emplace();
    const c10::NoGradGuard no_grad;
    const shm::Label whose(label);
    run(body, timeout);
  };
  auto work = c10::make_intrusive<TurnWork>(request.type, request.title, std::move(request.results),
                                            turns_);
  if (request.async) {
    work->submit(std::move(turn));
    return work;
  }
  work->run(turn, [this] { skip(); });
  return work;
}

// Called while an exception is under way that has come before this rank's part had its turn.
void Starter::skip() {
  group_.abort(reason());
  // What has the turn now uses the connections.
  if (spans_hosts()) turns_->enqueue([this] { tell_other_hosts(); });
}

// What the exception under way means to the other ranks.
std::string Starter::reason() const {
  const std::string who = "rank " + std::to_string(rank_);
  try {
    throw;
  } catch (const Interruption& error) {
    return who + " was interrupted (" + error.name() + ")";
  } catch (const std::exception& error) {
    return who + " failed: " + text_of(error);
  }
}

void Starter::run(const Body& body, std::chrono::milliseconds timeout) {
  try {
    body(deadline_in(timeout));
  } catch (const RefusedByAll& refused) {
    std::rethrow_exception(refused.error);
  } catch (const shm::Error& error) {
    if (spans_hosts()) tell_other_hosts();
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  } catch (const std::exception&) {
    // This rank may not have begun what the others are in.
    group_.abort(reason());
    if (spans_hosts()) tell_other_hosts();
    throw;
  }
}

// The other hosts would wait for this rank's part: they learn of it by the closed connections.
void Starter::tell_other_hosts() {
  connections_.close();
  auto lane = connections_.take_lane();
  // Within a turn, and a lane that is dropped waits for what is under way there.
  if (lane) turns_->enqueue([lane = std::move(lane)]() mutable { lane.reset(); });
}

// ---- a call that does not happen -------------------------------------------------------

void Starter::announce(shm::Kind kind) {
  check_usable();
  count_.fetch_add(1, std::memory_order_relaxed);
  const auto body = [this, kind, label = shm::Label::current()] {
    const shm::Label whose(label);
    const shm::Ending ending(group_);
    collectives_.announce(kind, 0, deadline_in(connections_.timeout()));
  };
  if (!turns_->idle()) {
    turns_->submit(body);
    return;
  }
  as_torch_error([&] { turns_->run(body, [this] { skip(); }); });
}

void Starter::refuse(const std::string& why) {
  try {
    announce(shm::Kind::kRefused);
  } catch (const c10::Error&) {  // the group is broken, which the next collective will say
  }
  TORCH_CHECK_VALUE(false, "fastddp: rank ", rank_, ": ", why);
}

void Starter::refuse_overlaps(const char* title, const std::vector<at::Tensor>& written) {
  for (const at::Tensor& tensor : written) {
    if (!overlaps_itself(tensor)) continue;
    refuse(c10::str(title, ": a tensor of shape ", tensor.sizes(), " and strides ",
                    tensor.strides(),
                    ", into which it would write, has elements that overlap, in "
                    "the same memory (it was expanded, or made by as_strided); pass a clone()"));
  }
}

// ---- life ------------------------------------------------------------------------------

void Starter::check_usable() const {
  TORCH_CHECK_WITH(DistBackendError, !fork_check_.is_forked(), "fastddp: rank ", rank_,
                   ": this process was forked from the one that made the process group, and cannot "
                   "use it; call init_process_group() here, or start the process by spawn");
  TORCH_CHECK_WITH(DistBackendError, !has_left_, "fastddp: rank ", rank_,
                   ": the process group was destroyed; make another one");
  check_not_within();
}

// What waits for a turn would wait for itself.
void Starter::check_not_within() const {
  TORCH_CHECK_WITH(DistBackendError, !turns_->is_within(), "fastddp: rank ", rank_,
                   ": a signal handler that was called within a collective has used the process "
                   "group of that collective; raise an exception in the handler instead, and use "
                   "the group where that is caught");
}

bool Starter::is_idle() const {
  // First, since another thread may have held a lock at the fork.
  return fork_check_.is_forked() || turns_->idle();
}

void Starter::leave(std::chrono::milliseconds patience) {
  check_not_within();
  has_left_ = true;
  // What is under way ends well if the other ranks come to it.
  const bool ended = turns_->wait_until_idle(patience);
  // Of a process that is ending the others wait for the end: it says more.
  if (Py_IsInitialized()) group_.leave();
  if (!ended)
    group_.abort("rank " + std::to_string(rank_) +
                 " has left the group with collectives under way");
  if (!turns_->stop(patience)) {
    TORCH_WARN("fastddp: rank ", rank_,
               ": what was chained to the future of a collective has "
               "not ended; its thread is left to it, and the group is destroyed without");
  }
  turns_->sweep();
}

void Starter::leak() { static_cast<void>(new std::shared_ptr<Turns>(std::move(turns_))); }

}  // namespace fastddp
