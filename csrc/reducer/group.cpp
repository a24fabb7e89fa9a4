#include "reducer/group.h"

#include <ATen/ThreadLocalPythonObjects.h>

#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "core/board.h"
#include "shm/label.h"
#include "tensor/patience.h"

namespace fastddp {
namespace {

// Hides Python objects from what a collective copies of the thread's state.
//
// During a backward, torch keeps Python's context variables in thread-local state, and a collective
// copies that into its work. The transport's thread often frees the last copy, for which it needs
// the GIL; if the interpreter is ending just then, the process aborts.
// (tests/parity/test_launch.py)
class WithoutPythonObjects {
 public:
  WithoutPythonObjects() { at::impl::ThreadLocalPythonObjects::set_state({}); }
  ~WithoutPythonObjects() { at::impl::ThreadLocalPythonObjects::set_state(std::move(saved_)); }
  WithoutPythonObjects(const WithoutPythonObjects&) = delete;
  WithoutPythonObjects& operator=(const WithoutPythonObjects&) = delete;

 private:
  at::impl::ThreadLocalPythonObjects saved_ = at::impl::ThreadLocalPythonObjects::get_state();
};

// Of its backend for CPU tensors.
std::string name_of_backend(c10d::ProcessGroup& group) {
  try {
    return group.getBackend(at::kCPU)->getBackendName();
  } catch (const c10::Error&) {  // a group of the user's making, which has no backends
    return {};
  }
}

std::uint64_t id_of(const c10d::ProcessGroup& group) {
  try {
    return board::id_of(group.getGroupName());
  } catch (const c10::Error&) {  // a group of the user's making, which has no name
    return 0;
  }
}

}  // namespace

Group::Group(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
             std::uint32_t owner,
             c10::Device device)
    : group_(group),
      owner_(owner),
      rank_(group->getRank()),
      size_(group->getSize()),
      id_(id_of(*group)),
      is_patient_(device.is_cpu() && name_of_backend(*group) == "gloo") {}

c10::intrusive_ptr<c10d::ProcessGroup> Group::get() const {
  auto group = group_.lock();
  TORCH_CHECK(group, "fastddp: rank ", rank_,
              ": the process group of this model was destroyed before its backward; call "
              "destroy_process_group() after the last step");
  return group;
}

Wait Group::start_all_reduce(at::Tensor tensor, std::size_t number, bool waits) const {
  std::vector<at::Tensor> tensors{std::move(tensor)};
  c10d::AllreduceOptions options;
  options.asyncOp = !waits;
  const std::uint64_t named = shm::Label::of(owner_, static_cast<std::uint32_t>(number + 1));
  const shm::Label label(named);
  const WithoutPythonObjects guard;
  board::note_issuer();
  try {
    auto work = get()->allreduce(tensors, options);
    if (!is_patient_) return [work = std::move(work)] { work->wait(); };
    const SlowWait::What what{board::Source::kBackward, id_, 0, named};
    return [work = std::move(work), what] {
      wait_patiently(*work, what, "the all-reduce of gradients");
    };
  } catch (const c10::DistBackendError&) {  // it has been waited for already
    return [error = std::current_exception()] { std::rethrow_exception(error); };
  }
}

void Group::wait_for(c10d::Work& work, const char* text) const {
  if (!is_patient_) {
    work.wait();
    return;
  }
  wait_patiently(work, {board::Source::kBackward, id_, 0, shm::Label::of(owner_)}, text);
}

c10::intrusive_ptr<c10d::Work> Group::all_reduce(std::vector<at::Tensor>& tensors) const {
  const shm::Label label(shm::Label::of(owner_));
  const WithoutPythonObjects guard;
  return get()->allreduce(tensors);
}

c10::intrusive_ptr<c10d::Work> Group::broadcast(std::vector<at::Tensor>& tensors) const {
  const shm::Label label(shm::Label::of(owner_));
  const WithoutPythonObjects guard;
  return get()->broadcast(tensors);
}

bool runs_inline(c10d::ProcessGroup& group) { return name_of_backend(group) == "shm"; }

std::shared_ptr<LaunchOrder> order_of(const c10d::ProcessGroup& group) {
  static std::mutex mutex;
  static std::map<const c10d::ProcessGroup*, std::weak_ptr<LaunchOrder>> orders;
  const std::lock_guard lock(mutex);
  std::erase_if(orders, [](const auto& one) { return one.second.expired(); });
  std::shared_ptr<LaunchOrder> order = orders[&group].lock();
  if (!order) orders[&group] = order = std::make_shared<LaunchOrder>();
  return order;
}

}  // namespace fastddp
