#include <Python.h>  // first, says its manual

#include "torch/shm_backend.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <utility>

#include "shm/error.h"
#include "shm/heap.h"
#include "torch/deadline.h"
#include "torch/error_text.h"

namespace fastddp {
namespace {

using c10d::OpType;
using c10d::ReduceOp;

// How long a rank that leaves lets collectives under way go on.
constexpr auto kPatience = std::chrono::milliseconds(5000);

// A group and what lies behind it.
struct Memory {
  shm::Segment control;
  std::vector<std::shared_ptr<const shm::Segment>> heaps;
  std::unique_ptr<shm::Group> group;
};

// How many forks lie between the first process and this one.
std::atomic<unsigned> forks{0};

unsigned count_forks() {
  [[maybe_unused]] static const int registered =
      ::pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  return forks.load(std::memory_order_relaxed);
}

std::optional<Element> element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kDouble:
      return Element::kFloat64;
    case at::kHalf:
      return Element::kFloat16;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kChar:
      return Element::kInt8;
    case at::kByte:
      return Element::kUInt8;
    case at::kShort:
      return Element::kInt16;
    case at::kInt:
      return Element::kInt32;
    case at::kLong:
      return Element::kInt64;
    case at::kBool:
      return Element::kBool;
    default:
      return std::nullopt;
  }
}

std::optional<Reduction> reduction_of(const ReduceOp& op) {
  switch (static_cast<ReduceOp::RedOpType>(op)) {
    case ReduceOp::SUM:
      return Reduction::kSum;
    case ReduceOp::AVG:
      return Reduction::kAvg;
    case ReduceOp::PRODUCT:
      return Reduction::kProduct;
    case ReduceOp::MIN:
      return Reduction::kMin;
    case ReduceOp::MAX:
      return Reduction::kMax;
    case ReduceOp::BAND:
      return Reduction::kBand;
    case ReduceOp::BOR:
      return Reduction::kBor;
    case ReduceOp::BXOR:
      return Reduction::kBxor;
    default:
      return std::nullopt;
  }
}

// Calls `body`, and has what the shared memory throws arrive as torch's exception.
template <typename Body>
void as_torch_error(const Body& body) {
  try {
    body();
  } catch (const shm::Error& error) {
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  }
}

// Threads are joined that may want the GIL, by whoever drops the last reference; that may hold it.
class WithoutGil {
 public:
  WithoutGil() : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

// What there is to reduce: complex numbers as pairs where that is the same.
at::Tensor as_real(const at::Tensor& tensor, const ReduceOp& op) {
  return tensor.is_complex() && c10d::isComplexViewAsRealAllowed(op) ? at::view_as_real(tensor)
                                                                     : tensor;
}

bool can_reduce(const at::Tensor& tensor, const ReduceOp& op) {
  if (tensor.layout() != at::kStrided || !tensor.is_cpu()) return false;
  const auto element = element_of(as_real(tensor, op).scalar_type());
  const auto reduction = reduction_of(op);
  return element && reduction && find_reduce(*element, *reduction) != nullptr;
}

bool can_move(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.is_cpu();
}

// Of a contiguous tensor; one of a dtype without a name here goes as bytes.
shm::Operand operand_of(const at::Tensor& tensor) {
  const auto element = element_of(tensor.scalar_type());
  return {tensor.data_ptr(), element ? static_cast<std::size_t>(tensor.numel()) : tensor.nbytes(),
          element.value_or(Element::kUInt8)};
}

template <typename Tensors>
bool same_size(const Tensors& tensors, const at::Tensor& like) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    return can_move(tensor) && tensor.numel() == like.numel() &&
           tensor.scalar_type() == like.scalar_type();
  });
}

std::vector<at::Tensor> parts_of(const at::Tensor& whole, int count) {
  std::vector<at::Tensor> parts;
  const at::Tensor flat = whole.view({-1});
  const std::int64_t numel = flat.numel() / count;
  for (int i = 0; i < count; ++i) parts.push_back(flat.narrow(0, i * numel, numel));
  return parts;
}

at::ScalarType dtype_of(Element element) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kChar,
                                     at::kByte, at::kShort, at::kInt, at::kLong}) {
    if (element_of(dtype) == element) return dtype;
  }
  return at::kBool;
}

ReduceOp::RedOpType op_of(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
    case Reduction::kAvg:  // divided once all hosts are in it
      return ReduceOp::SUM;
    case Reduction::kProduct:
      return ReduceOp::PRODUCT;
    case Reduction::kMin:
      return ReduceOp::MIN;
    case Reduction::kMax:
      return ReduceOp::MAX;
    case Reduction::kBand:
      return ReduceOp::BAND;
    case Reduction::kBor:
      return ReduceOp::BOR;
    case Reduction::kBxor:
      return ReduceOp::BXOR;
  }
  return ReduceOp::UNUSED;
}

// The parts of one all-reduce on their way through a lane.
class Crossing final : public shm::CrossHosts {
 public:
  Crossing(const Lanes& lanes,
           shm::Group& group,
           Element element,
           Reduction reduction,
           shm::Deadline deadline)
      : lanes_(lanes),
        group_(group),
        dtype_(dtype_of(element)),
        op_(op_of(reduction)),
        deadline_(deadline) {}

  // Gloo ends the process that gets more than it has room for, and adds up what is of other types.
  void compare(const shm::Call& call) override {
    const at::Tensor mine = at::tensor(
        {static_cast<std::int64_t>(call.element), static_cast<std::int64_t>(call.reduction),
         static_cast<std::int64_t>(call.numel)},
        at::kLong);
    std::vector<at::Tensor> inputs{mine};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (std::size_t i = 0; i < lanes_.ranks.size(); ++i)
      outputs[0].push_back(at::empty_like(mine));
    c10d::AllgatherOptions options;
    options.timeout = time_left();
    await(*launched([&] { return lanes_.backend->allgather(outputs, inputs, options); }));
    for (std::size_t i = 0; i < lanes_.ranks.size(); ++i) {
      if (outputs[0][i].equal(mine)) continue;
      const auto* const theirs = outputs[0][i].const_data_ptr<std::int64_t>();
      group_.fail("the hosts do not agree: here the ranks called " + group_.describe(call) +
                  ", rank " + std::to_string(lanes_.ranks[i]) + " called " +
                  group_.describe({.kind = call.kind,
                                   .element = static_cast<Element>(theirs[0]),
                                   .reduction = static_cast<Reduction>(theirs[1]),
                                   .numel = static_cast<std::uint64_t>(theirs[2])}));
    }
  }

  void start(void* data, std::size_t numel) override {
    if (numel == 0) return under_way_.push_back({});
    std::vector<at::Tensor> part{at::from_blob(data, {static_cast<std::int64_t>(numel)}, dtype_)};
    c10d::AllreduceOptions options;
    options.reduceOp = op_;
    options.timeout = time_left();
    under_way_.push_back(launched([&] { return lanes_.backend->allreduce(part, options); }));
  }

  void finish() override {
    const auto work = std::move(under_way_.front());
    under_way_.pop_front();
    if (work) await(*work);
  }

 private:
  static constexpr std::chrono::milliseconds kLookAround{50};

  std::chrono::milliseconds time_left() const {
    const auto left = deadline_ - std::chrono::steady_clock::now();
    return std::max(std::chrono::ceil<std::chrono::milliseconds>(left),
                    std::chrono::milliseconds(1));
  }

  template <typename Launch>
  c10::intrusive_ptr<c10d::Work> launched(const Launch& launch) {
    try {
      return launch();
    } catch (const std::exception& error) {
      fail(error);
    }
  }

  void await(c10d::Work& work) {
    // If another rank here breaks the group, what this waits for may never arrive.
    while (!work.isCompleted()) {
      try {
        work.wait(kLookAround);
      } catch (const std::exception&) {
        group_.check_current();
      }
    }
    try {
      work.wait(kNoTimeout);
    } catch (const std::exception& error) {
      fail(error);
    }
  }

  [[noreturn]] void fail(const std::exception& error) {
    std::string ranks;
    for (const int rank : lanes_.ranks) ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
    group_.fail("between hosts, among ranks " + ranks + ": " + text_of(error));
  }

  const Lanes& lanes_;
  shm::Group& group_;
  const at::ScalarType dtype_;
  const ReduceOp::RedOpType op_;
  const shm::Deadline deadline_;
  std::deque<c10::intrusive_ptr<c10d::Work>> under_way_;
};

}  // namespace

// ---- life ------------------------------------------------------------------------------

shm::Segment ShmBackend::make_control(std::size_t ranks) {
  auto segment = shm::Segment::create("fastddp-group", shm::Layout::bytes(ranks));
  shm::Layout(segment.data(), ranks).construct();
  return segment;
}

ShmBackend::ShmBackend(int rank,
                       int size,
                       c10::intrusive_ptr<c10d::Backend> inner,
                       const LocalRanks& local,
                       std::chrono::milliseconds timeout)
    : Backend(rank, size),
      options_(c10::make_intrusive<Options>("shm", timeout)),
      inner_(std::move(inner)),
      forks_(count_forks()) {
  const std::size_t count = local.ranks.size();
  const auto memory = std::make_shared<Memory>();
  std::vector<shm::Member> members;
  for (std::size_t i = 0; i < count; ++i) {
    const shm::Address& address = local.heaps.at(i);
    // First, so that the heap proves it to be the right process.
    const auto process = std::make_shared<const shm::Process>(address.pid);
    char* heap = shm::Heap::mine().data();
    if (!(address == shm::Heap::mine().address())) {
      memory->heaps.push_back(shm::open_peer_heap(address));
      heap = memory->heaps.back()->data();
    }
    members.push_back({local.ranks[i], heap, process});
  }
  memory->control = shm::Segment::open(local.control);
  const shm::Layout layout(memory->control.data(), count);
  if (memory->control.size() != shm::Layout::bytes(count) ||
      layout.header().version != shm::kLayoutVersion || layout.header().ranks != count) {
    throw shm::Error("the ranks use different versions of fastddp");
  }
  const auto me = std::find(local.ranks.begin(), local.ranks.end(), rank) - local.ranks.begin();
  memory->group =
      std::make_unique<shm::Group>(layout, std::move(members), static_cast<std::size_t>(me));
  group_ = {memory, memory->group.get()};
  collectives_ = std::make_unique<shm::Collectives>(*group_);
}

ShmBackend::~ShmBackend() {
  if (forks_ != count_forks()) {
    // The parent's: neither its thread nor its sockets' threads are here.
    static_cast<void>(inner_.release());
    static_cast<void>(lanes_.backend.release());
    static_cast<void>(new std::shared_ptr<Turns>(std::move(turns_)));
    return;
  }
  shutdown();
  const WithoutGil without_gil;
  inner_.reset();
  lanes_.backend.reset();
}

void ShmBackend::shutdown() {
  if (forks_ != count_forks()) return;  // the parent goes on
  const WithoutGil without_gil;
  has_left_ = true;
  // What is under way ends well if the other ranks come to it.
  const bool ended = turns_->wait_until_idle(std::min(options_->timeout, kPatience));
  // Of a process that is ending the others wait for the end: it says more.
  if (Py_IsInitialized()) group_->leave();
  if (!ended)
    group_->abort("rank " + std::to_string(getRank()) +
                  " has left the group with collectives under way");
  turns_->stop();
  turns_->sweep();
}

bool ShmBackend::is_idle() const {
  // First, since another thread may have held a lock at the fork.
  return forks_ != count_forks() || turns_->idle();
}

void ShmBackend::abort() {
  check_usable();
  group_->abort("rank " + std::to_string(getRank()) + " has aborted the group");
  inner_->abort();
}

void ShmBackend::check_usable() const {
  TORCH_CHECK_WITH(DistBackendError, forks_ == forks.load(std::memory_order_relaxed),
                   "fastddp: rank ", getRank(),
                   ": this process was forked from the one that made the process group, and cannot "
                   "use it; call init_process_group() here, or start the process by spawn");
  TORCH_CHECK_WITH(DistBackendError, !has_left_, "fastddp: rank ", getRank(),
                   ": the process group was destroyed; make another one");
}

c10::intrusive_ptr<c10d::Backend::Options> ShmBackend::getBackendOptions() {
  // The inner backend's may have been changed by whoever else has it.
  options_->timeout = inner_->getBackendOptions()->timeout;
  return options_;
}

void ShmBackend::setTimeout(std::chrono::milliseconds timeout) {
  options_->timeout = timeout;
  inner_->setTimeout(timeout);
}

at::Tensor ShmBackend::allocateTensor(long size, at::TensorOptions options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const auto bytes = static_cast<std::size_t>(size) * c10::elementSize(dtype);
  shm::Heap& heap = shm::Heap::mine();
  void* block = nullptr;
  try {
    block = heap.allocate(bytes);
  } catch (const shm::Error& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "fastddp: rank ", getRank(), ": ", error.what());
  }
  return at::from_blob(
      block, {size}, [&heap](void* memory) { heap.free(memory); }, options.device(at::kCPU));
}

// ---- starting a collective -------------------------------------------------------------

c10::intrusive_ptr<c10d::Work> ShmBackend::start(OpType type,
                                                 const char* title,
                                                 Tensors results,
                                                 std::chrono::milliseconds timeout,
                                                 bool async,
                                                 Body body) {
  check_usable();
  if (timeout == c10d::kUnsetTimeout) timeout = inner_->getBackendOptions()->timeout;
  Turns::Body run = [this, timeout, body = std::move(body)] {
    const c10::NoGradGuard no_grad;
    try {
      body(deadline_in(timeout));
    } catch (const shm::Error& error) {
      TORCH_CHECK_WITH(DistBackendError, false, error.what());
    } catch (const std::exception& error) {
      // This rank may not have begun what the others are in.
      group_->abort("rank " + std::to_string(getRank()) + " failed: " + text_of(error));
      throw;
    }
  };
  auto work = c10::make_intrusive<TurnWork>(type, title, std::move(results), turns_);
  if (async) {
    work->submit(std::move(run));
  } else {
    work->run(run);
  }
  return work;
}

template <typename Start>
c10::intrusive_ptr<c10d::Work> ShmBackend::hand_on(shm::Kind kind, Start start, std::int64_t root) {
  announce(kind, root);
  return c10::make_intrusive<HandedWork>(
      start(), [group = group_] { as_torch_error([&] { group->check(); }); });
}

void ShmBackend::announce(shm::Kind kind, std::int64_t root) {
  check_usable();
  const auto body = [this, kind, root] {
    collectives_->announce(kind, static_cast<int>(root),
                           deadline_in(inner_->getBackendOptions()->timeout));
  };
  if (!turns_->idle()) {
    turns_->submit(body, {});
    return;
  }
  as_torch_error([&] { turns_->run(body); });
}

// ---- all_reduce ------------------------------------------------------------------------

bool ShmBackend::can_all_reduce(const at::Tensor& tensor, const ReduceOp& op) const {
  // A lane can carry what gloo can.
  return can_reduce(tensor, op) && !(spans_hosts() && tensor.scalar_type() == at::kShort);
}

void ShmBackend::all_reduce(const at::Tensor& tensor, const ReduceOp& op, shm::Deadline deadline) {
  const at::Tensor real = as_real(tensor, op);
  const at::Tensor packed = real.contiguous();
  const Reduction reduction = *reduction_of(op);
  if (spans_hosts()) {
    all_reduce_across(operand_of(packed), reduction, deadline);
  } else {
    collectives_->all_reduce(operand_of(packed), reduction, getSize(), deadline);
  }
  if (!packed.is_same(real)) real.copy_(packed);
}

void ShmBackend::all_reduce_across(const shm::Operand& operand,
                                   Reduction reduction,
                                   shm::Deadline deadline) {
  void* staging = nullptr;
  if (!shm::Heap::mine().contains(operand.data, operand.bytes())) {
    if (!staging_.defined())
      staging_ = allocateTensor(shm::kStagedPieces * shm::kPieceBytes, at::kByte);
    staging = staging_.data_ptr();
  }
  try {
    Crossing crossing(lanes_, *group_, operand.element, reduction, deadline);
    collectives_->all_reduce_across(operand, reduction, getSize(),
                                    static_cast<std::size_t>(lanes_.count), crossing, staging,
                                    deadline);
  } catch (const shm::Error&) {
    // The other hosts would wait for this rank's part: they learn of it by the closed connections.
    // Closing waits for what is under way.
    if (lanes_.backend) {
      turns_->submit([lane = std::exchange(lanes_.backend, {})]() mutable { lane.reset(); }, {});
    }
    throw;
  }
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allreduce(Tensors& tensors,
                                                     const c10d::AllreduceOptions& options) {
  if (tensors.size() != 1 || !can_all_reduce(tensors[0], options.reduceOp)) {
    return hand_on(shm::Kind::kOther, [&] { return inner_->allreduce(tensors, options); });
  }
  return start(OpType::ALLREDUCE, "shm:all_reduce", tensors, options.timeout, options.asyncOp,
               [this, tensor = tensors[0], op = options.reduceOp](shm::Deadline deadline) {
                 all_reduce(tensor, op, deadline);
               });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  const auto can = [&](const at::Tensor& tensor) {
    return can_all_reduce(tensor, options.reduceOp);
  };
  if (!std::all_of(tensors.begin(), tensors.end(), can)) {
    return hand_on(shm::Kind::kOther,
                   [&] { return inner_->allreduce_coalesced(tensors, options); });
  }
  return start(OpType::ALLREDUCE_COALESCED, "shm:all_reduce", tensors, options.timeout,
               options.asyncOp, [this, tensors, op = options.reduceOp](shm::Deadline deadline) {
                 for (const at::Tensor& tensor : tensors) all_reduce(tensor, op, deadline);
               });
}

// ---- broadcast, all_gather -------------------------------------------------------------

c10::intrusive_ptr<c10d::Work> ShmBackend::broadcast(Tensors& tensors,
                                                     const c10d::BroadcastOptions& options) {
  if (tensors.size() != 1 || !can_move(tensors[0]) || spans_hosts()) {
    return hand_on(shm::Kind::kOther, [&] { return inner_->broadcast(tensors, options); });
  }
  const int root = static_cast<int>(options.rootRank);
  TORCH_CHECK_VALUE(root >= 0 && root < getSize(), "fastddp: rank ", getRank(),
                    ": broadcast from rank ", root, " in a group of ", getSize());
  return start(OpType::BROADCAST, "shm:broadcast", tensors, options.timeout, options.asyncOp,
               [this, tensor = tensors[0], root](shm::Deadline deadline) {
                 const at::Tensor packed = tensor.contiguous();
                 collectives_->broadcast(operand_of(packed), root, deadline);
                 if (!packed.is_same(tensor) && root != getRank()) tensor.copy_(packed);
               });
}

void ShmBackend::all_gather(const Tensors& outputs,
                            const at::Tensor& input,
                            shm::Deadline deadline) {
  const at::Tensor packed_input = input.contiguous();
  Tensors packed;
  std::vector<void*> addresses;
  for (const at::Tensor& output : outputs) {
    packed.push_back(output.is_contiguous() ? output
                                            : at::empty_like(output, at::MemoryFormat::Contiguous));
    addresses.push_back(packed.back().data_ptr());
  }
  collectives_->all_gather(operand_of(packed_input), addresses, deadline);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (!packed[i].is_same(outputs[i])) outputs[i].copy_(packed[i]);
  }
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allgather(Lists& outputs,
                                                     Tensors& inputs,
                                                     const c10d::AllgatherOptions& options) {
  if (inputs.size() != 1 || outputs.size() != 1 || spans_hosts() || !can_move(inputs[0]) ||
      outputs[0].size() != static_cast<std::size_t>(getSize()) ||
      !same_size(outputs[0], inputs[0])) {
    return hand_on(shm::Kind::kOther, [&] { return inner_->allgather(outputs, inputs, options); });
  }
  return start(OpType::ALLGATHER, "shm:all_gather", outputs[0], options.timeout, options.asyncOp,
               [this, outputs = outputs[0], input = inputs[0]](shm::Deadline deadline) {
                 all_gather(outputs, input, deadline);
               });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::_allgather_base(at::Tensor& output,
                                                           at::Tensor& input,
                                                           const c10d::AllgatherOptions& options) {
  Tensors outputs{output};
  Tensors inputs{input};
  if (spans_hosts() || !can_move(input) || !can_move(output) || !output.is_contiguous() ||
      output.numel() != input.numel() * getSize() || output.scalar_type() != input.scalar_type()) {
    return hand_on(shm::Kind::kOther,
                   [&] { return inner_->_allgather_base(output, input, options); });
  }
  return allgather_into_tensor_coalesced(outputs, inputs, options);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allgather_coalesced(
    Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return hand_on(shm::Kind::kOther,
                 [&] { return inner_->allgather_coalesced(outputs, inputs, options); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  bool ours = !spans_hosts() && outputs.size() == inputs.size();
  for (std::size_t i = 0; ours && i < inputs.size(); ++i) {
    ours = can_move(inputs[i]) && can_move(outputs[i]) && outputs[i].is_contiguous() &&
           outputs[i].numel() == inputs[i].numel() * getSize() &&
           outputs[i].scalar_type() == inputs[i].scalar_type();
  }
  if (!ours) {
    return hand_on(shm::Kind::kOther, [&] {
      return inner_->allgather_into_tensor_coalesced(outputs, inputs, options);
    });
  }
  return start(OpType::_ALLGATHER_BASE, "shm:all_gather", outputs, options.timeout, options.asyncOp,
               [this, outputs, inputs](shm::Deadline deadline) {
                 for (std::size_t i = 0; i < inputs.size(); ++i)
                   all_gather(parts_of(outputs[i], getSize()), inputs[i], deadline);
               });
}

// ---- reduce_scatter --------------------------------------------------------------------

void ShmBackend::reduce_scatter(const at::Tensor& output,
                                const Tensors& inputs,
                                const at::Tensor& block,
                                const ReduceOp& op,
                                shm::Deadline deadline) {
  const at::Tensor real = as_real(output, op);
  const at::Tensor packed =
      real.is_contiguous() ? real : at::empty_like(real, at::MemoryFormat::Contiguous);
  Tensors packed_inputs;
  std::vector<void*> addresses;
  for (const at::Tensor& input : inputs) {
    packed_inputs.push_back(as_real(input, op).contiguous());
    addresses.push_back(packed_inputs.back().data_ptr());
  }
  collectives_->reduce_scatter(operand_of(packed), addresses,
                               block.defined() ? block.const_data_ptr() : nullptr,
                               *reduction_of(op), getSize(), deadline);
  if (!packed.is_same(real)) real.copy_(packed);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::reduce_scatter(
    Tensors& outputs, Lists& inputs, const c10d::ReduceScatterOptions& options) {
  if (outputs.size() != 1 || inputs.size() != 1 || spans_hosts() ||
      !can_reduce(outputs[0], options.reduceOp) ||
      inputs[0].size() != static_cast<std::size_t>(getSize()) ||
      !same_size(inputs[0], outputs[0])) {
    return hand_on(shm::Kind::kOther,
                   [&] { return inner_->reduce_scatter(outputs, inputs, options); });
  }
  return start(OpType::REDUCE_SCATTER, "shm:reduce_scatter", outputs, options.timeout,
               options.asyncOp,
               [this, output = outputs[0], inputs = inputs[0], op = options.reduceOp](
                   shm::Deadline deadline) { reduce_scatter(output, inputs, {}, op, deadline); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  Tensors outputs{output};
  Tensors inputs{input};
  return reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  bool ours = !spans_hosts() && outputs.size() == inputs.size();
  for (std::size_t i = 0; ours && i < inputs.size(); ++i) {
    ours = can_reduce(outputs[i], options.reduceOp) && can_move(inputs[i]) &&
           inputs[i].numel() == outputs[i].numel() * getSize() &&
           outputs[i].scalar_type() == inputs[i].scalar_type();
  }
  if (!ours) {
    return hand_on(shm::Kind::kOther, [&] {
      return outputs.size() == 1 && inputs.size() == 1
                 ? inner_->_reduce_scatter_base(outputs[0], inputs[0], options)
                 : inner_->reduce_scatter_tensor_coalesced(outputs, inputs, options);
    });
  }
  return start(OpType::_REDUCE_SCATTER_BASE, "shm:reduce_scatter", outputs, options.timeout,
               options.asyncOp,
               [this, outputs, inputs, op = options.reduceOp](shm::Deadline deadline) {
                 for (std::size_t i = 0; i < inputs.size(); ++i) {
                   const at::Tensor block = inputs[i].contiguous();
                   reduce_scatter(outputs[i], parts_of(block, getSize()), block, op, deadline);
                 }
               });
}

// ---- the rest --------------------------------------------------------------------------

c10::intrusive_ptr<c10d::Work> ShmBackend::barrier(const c10d::BarrierOptions& options) {
  if (spans_hosts()) {
    return hand_on(shm::Kind::kOther, [&] { return inner_->barrier(options); });
  }
  return start(OpType::BARRIER, "shm:barrier", {}, options.timeout, options.asyncOp,
               [this](shm::Deadline deadline) { collectives_->barrier(deadline); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allreduce_sparse(Tensors& tensors,
                                                            const c10d::AllreduceOptions& options) {
  return hand_on(shm::Kind::kOther, [&] { return inner_->allreduce_sparse(tensors, options); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::reduce(Tensors& tensors,
                                                  const c10d::ReduceOptions& options) {
  return hand_on(
      shm::Kind::kReduce, [&] { return inner_->reduce(tensors, options); }, options.rootRank);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::gather(Lists& outputs,
                                                  Tensors& inputs,
                                                  const c10d::GatherOptions& options) {
  // gloo gathers no complex numbers.
  const auto real = [](Tensors& tensors) {
    for (at::Tensor& tensor : tensors)
      tensor = tensor.is_complex() ? at::view_as_real(tensor) : tensor;
  };
  std::for_each(outputs.begin(), outputs.end(), real);
  real(inputs);
  return hand_on(
      shm::Kind::kGather, [&] { return inner_->gather(outputs, inputs, options); },
      options.rootRank);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::scatter(Tensors& outputs,
                                                   Lists& inputs,
                                                   const c10d::ScatterOptions& options) {
  return hand_on(
      shm::Kind::kScatter, [&] { return inner_->scatter(outputs, inputs, options); },
      options.rootRank);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::alltoall_base(at::Tensor& output,
                                                         at::Tensor& input,
                                                         std::vector<std::int64_t>& output_splits,
                                                         std::vector<std::int64_t>& input_splits,
                                                         const c10d::AllToAllOptions& options) {
  return hand_on(shm::Kind::kAllToAll, [&] {
    return inner_->alltoall_base(output, input, output_splits, input_splits, options);
  });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::alltoall(Tensors& outputs,
                                                    Tensors& inputs,
                                                    const c10d::AllToAllOptions& options) {
  return hand_on(shm::Kind::kAllToAll, [&] { return inner_->alltoall(outputs, inputs, options); });
}

// Not collectives: the ranks that take no part do not hear of these.

c10::intrusive_ptr<c10d::Work> ShmBackend::send(Tensors& tensors, int to, int tag) {
  check_usable();
  return inner_->send(tensors, to, tag);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::recv(Tensors& tensors, int from, int tag) {
  check_usable();
  return inner_->recv(tensors, from, tag);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::recvAnysource(Tensors& tensors, int tag) {
  check_usable();
  return inner_->recvAnysource(tensors, tag);
}

void ShmBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  announce(shm::Kind::kOther);
  inner_->monitoredBarrier(options, wait_all_ranks);
}

}  // namespace fastddp
