#include <Python.h>  // first, says its manual

#include "backend/shm_backend.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <pthread.h>
#include <torch/csrc/distributed/c10d/Utils.hpp>

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "backend/deadline.h"
#include "backend/particulars.h"
#include "backend/plain.h"
#include "shm/error.h"
#include "shm/heap.h"
#include "shm/label.h"
#include "tensor/error_text.h"

namespace fastddp {
namespace {

using c10d::OpType;
using c10d::ReduceOp;

// How long a rank that leaves lets collectives under way go on.
constexpr auto kPatience = std::chrono::milliseconds(5000);

constexpr auto kShortest = std::chrono::milliseconds(1);

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

// What another backend threw on every rank when it was called: the group is as it was.
struct RefusedByAll {
  std::exception_ptr error;
};

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

// What there is to reduce: complex numbers as pairs where that is the same. Of a plain tensor.
at::Tensor as_real(const at::Tensor& tensor, const ReduceOp& op) {
  return tensor.is_complex() && c10d::isComplexViewAsRealAllowed(op) ? at::view_as_real(tensor)
                                                                     : tensor;
}

bool can_reduce(const at::Tensor& tensor, const ReduceOp& op) {
  if (tensor.layout() != at::kStrided || !tensor.is_cpu()) return false;
  const bool as_pairs = tensor.is_complex() && c10d::isComplexViewAsRealAllowed(op);
  const auto element =
      element_of(as_pairs ? c10::toRealValueType(tensor.scalar_type()) : tensor.scalar_type());
  const auto reduction = reduction_of(op);
  return element && reduction && find_reduce(*element, *reduction) != nullptr;
}

bool can_move(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.is_cpu();
}

shm::TypeName type_name(at::ScalarType dtype) {
  shm::TypeName name{};
  name_of(dtype).copy(name.data(), name.size());
  return name;
}

// Of a plain tensor, which may be another one's view as pairs; a dtype without a name here goes as
// bytes.
shm::Operand operand_of(const at::Tensor& tensor, at::ScalarType dtype) {
  const auto element = element_of(tensor.scalar_type());
  return {tensor.data_ptr(), element ? static_cast<std::size_t>(tensor.numel()) : tensor.nbytes(),
          element.value_or(Element::kUInt8),
          element && tensor.scalar_type() == dtype ? shm::TypeName{} : type_name(dtype)};
}

shm::Operand operand_of(const at::Tensor& tensor) {
  return operand_of(tensor, tensor.scalar_type());
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

// Each once, in order.
std::string names_of_dtypes(const std::vector<at::Tensor>& tensors) {
  std::set<std::string> names;
  for (const at::Tensor& tensor : tensors) names.insert(name_of(tensor.scalar_type()));
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

bool is_reduction(shm::Kind kind) {
  return kind == shm::Kind::kAllReduce || kind == shm::Kind::kReduceScatter ||
         kind == shm::Kind::kReduce;
}

// What a message arrives in is written to at any time until it is waited for: no copy in its place.
void check_received(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(is_plain(tensor),
                      "fastddp: recv into a tensor that is not contiguous, or a conjugated or "
                      "negated view; pass a contiguous one and copy from it");
  }
}

std::string with_root(const std::string& name, std::int64_t root) {
  return name + " with root " + std::to_string(root) + " ";
}

std::vector<at::Tensor> flat(const std::vector<std::vector<at::Tensor>>& lists) {
  std::vector<at::Tensor> all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

void check_splits(const at::Tensor& tensor, const std::vector<std::int64_t>& splits, int ranks) {
  c10d::checkSplitSizes(splits, tensor, ranks);
  for (const std::int64_t rows : splits) TORCH_CHECK_VALUE(rows >= 0, "a split size is ", rows);
}

// The elements in each rank's part of a tensor that is cut in its first dimension; evenly if there
// are no splits.
std::vector<std::int64_t> elements_of_splits(const at::Tensor& tensor,
                                             const std::vector<std::int64_t>& splits,
                                             int ranks) {
  if (splits.empty())
    return std::vector<std::int64_t>(static_cast<std::size_t>(ranks), tensor.numel() / ranks);
  const std::int64_t row = tensor.numel() / std::max<std::int64_t>(tensor.size(0), 1);
  std::vector<std::int64_t> elements;
  for (const std::int64_t rows : splits) elements.push_back(rows * row);
  return elements;
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

// What this rank does together with those that have its place on the other hosts.
class Lane {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;

  Lane(const Lanes& lanes, shm::Group& group, shm::Deadline deadline)
      : lanes_(lanes), group_(group), deadline_(deadline) {}

  const std::vector<int>& ranks() const { return lanes_.ranks; }

  // Returns what each of the ranks gave, tensors of one shape.
  std::vector<at::Tensor> gather(const at::Tensor& mine) {
    std::vector<at::Tensor> inputs{mine};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (std::size_t i = 0; i < ranks().size(); ++i) outputs[0].push_back(at::empty_like(mine));
    await(*launched<c10d::AllgatherOptions>([&](const c10d::AllgatherOptions& options) {
      return lanes_.backend->allgather(outputs, inputs, options);
    }));
    return std::move(outputs[0]);
  }

  Work all_reduce(const at::Tensor& part, ReduceOp::RedOpType op) {
    std::vector<at::Tensor> parts{part};
    return launched<c10d::AllreduceOptions>([&](c10d::AllreduceOptions options) {
      options.reduceOp = op;
      return lanes_.backend->allreduce(parts, options);
    });
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

 private:
  static constexpr std::chrono::milliseconds kLookAround{50};

  template <typename Options, typename Launch>
  Work launched(const Launch& launch) {
    Options options;
    options.timeout = time_left(deadline_);
    try {
      return launch(options);
    } catch (const std::exception& error) {
      fail(error);
    }
  }

  [[noreturn]] void fail(const std::exception& error) {
    std::string names;
    for (const int rank : ranks()) names += (names.empty() ? "" : ", ") + std::to_string(rank);
    group_.fail("between hosts, among ranks " + names + ": " + text_of(error));
  }

  const Lanes& lanes_;
  shm::Group& group_;
  const shm::Deadline deadline_;
};

// The parts of one all-reduce on their way through a lane.
class Crossing final : public shm::CrossHosts {
 public:
  Crossing(Lane lane, shm::Group& group, Element element, Reduction reduction)
      : lane_(std::move(lane)), group_(group), dtype_(dtype_of(element)), op_(op_of(reduction)) {}

  // Gloo ends the process that gets more than it has room for, and adds up what is of other types.
  void compare(const shm::Call& call) override {
    const at::Tensor mine = at::tensor(
        {static_cast<std::int64_t>(call.element), static_cast<std::int64_t>(call.reduction),
         static_cast<std::int64_t>(call.numel), static_cast<std::int64_t>(call.label),
         static_cast<std::int64_t>(group_.count())},
        at::kLong);
    const auto all = lane_.gather(mine);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i].equal(mine)) continue;
      const auto* const theirs = all[i].const_data_ptr<std::int64_t>();
      const shm::Call others{.kind = call.kind,
                             .element = static_cast<Element>(theirs[0]),
                             .reduction = static_cast<Reduction>(theirs[1]),
                             .numel = static_cast<std::uint64_t>(theirs[2]),
                             .label = static_cast<std::uint64_t>(theirs[3])};
      const std::string who = "rank " + std::to_string(lane_.ranks()[i]);
      group_.fail("the hosts do not agree: " +
                  group_.describe_difference("here the ranks", call, who, others) +
                  (theirs[4] == mine[4].item<std::int64_t>()
                       ? ""
                       : " as collective " + std::to_string(theirs[4]) +
                             "; has one host refused a call for its arguments?"));
    }
  }

  void start(void* data, std::size_t numel) override {
    if (numel == 0) return under_way_.push_back({});
    const auto part = at::from_blob(data, {static_cast<std::int64_t>(numel)}, dtype_);
    under_way_.push_back(lane_.all_reduce(part, op_));
  }

  void finish() override {
    const auto work = std::move(under_way_.front());
    under_way_.pop_front();
    if (work) lane_.await(*work);
  }

 private:
  Lane lane_;
  shm::Group& group_;
  const at::ScalarType dtype_;
  const ReduceOp::RedOpType op_;
  std::deque<c10::intrusive_ptr<c10d::Work>> under_way_;
};

// Which of some ranks, or of all, refused a call.
struct Refusals {
  bool by_all = true;
  std::string first;  // "rank 1 failed: ..."; empty if none of them did

  void add(const Refusals& others) {
    by_all = by_all && others.by_all;
    if (first.empty()) first = others.first;
  }

  // As many bytes for all ranks.
  std::string packed() const {
    std::string text = (by_all ? "+" : "-") + first;
    text.resize(Particulars::kTextBytes);
    return text;
  }
  static Refusals unpacked(const std::string& text) {
    const std::string first = text.substr(std::min<std::size_t>(1, text.size()));
    return {text.substr(0, 1) == "+", first.substr(0, first.find('\0'))};
  }
};

Refusals sum_of(const std::vector<std::string>& parts) {
  Refusals sum;
  for (const std::string& part : parts) sum.add(Refusals::unpacked(part));
  return sum;
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
                       std::chrono::milliseconds patience)
    : Backend(rank, size),
      inner_(std::move(inner)),
      patience_(std::min(patience, kPatience)),
      forks_(count_forks()) {
  const std::size_t count = local.ranks.size();
  const auto memory = std::make_shared<Memory>();
  std::vector<shm::Member> members;
  for (std::size_t i = 0; i < count; ++i) {
    const shm::Address& address = local.heaps.at(i);
    // First, so that the heap proves it to be the right process.
    const auto process = shm::process_of(address);
    char* heap = shm::Heap::mine().data();
    if (!(address == shm::Heap::mine().address())) {
      memory->heaps.push_back(shm::open_peer_heap(address));
      heap = memory->heaps.back()->data();
    }
    members.push_back({local.ranks[i], heap, address.bytes, process});
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
  messages_.emplace(layout, count, static_cast<std::size_t>(me));
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
  const bool ended = turns_->wait_until_idle(patience_);
  // Of a process that is ending the others wait for the end: it says more.
  if (Py_IsInitialized()) group_->leave();
  if (!ended)
    group_->abort("rank " + std::to_string(getRank()) +
                  " has left the group with collectives under way");
  if (!turns_->stop(patience_)) {
    TORCH_WARN("fastddp: rank ", getRank(),
               ": what was chained to the future of a collective has "
               "not ended; its thread is left to it, and the group is destroyed without");
  }
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
  return c10::make_intrusive<Options>("shm", timeout());
}

void ShmBackend::setTimeout(std::chrono::milliseconds timeout) {
  inner_->setTimeout(timeout);  // what goes through a lane is given its timeout each time
}

// The inner backend's, which whoever else has its options may change.
std::chrono::milliseconds ShmBackend::timeout() const {
  return inner_->getBackendOptions()->timeout;
}

at::Tensor ShmBackend::allocateTensor(long size, at::TensorOptions options) {
  const std::size_t element = c10::elementSize(c10::typeMetaToScalarType(options.dtype()));
  TORCH_CHECK_VALUE(size >= 0, "fastddp: rank ", getRank(), ": a tensor of ", size, " elements");
  const auto numel = static_cast<std::size_t>(size);
  TORCH_CHECK_WITH(OutOfMemoryError, numel <= std::numeric_limits<std::size_t>::max() / element,
                   "fastddp: rank ", getRank(), ": no memory has room for ", size, " elements of ",
                   element, " bytes");
  shm::Heap& heap = shm::Heap::mine();
  void* block = nullptr;
  try {
    block = heap.allocate(numel * element);
  } catch (const shm::NoRoom& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "fastddp: rank ", getRank(), ": ", error.what());
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
  launched_.fetch_add(1, std::memory_order_relaxed);
  if (timeout == c10d::kUnsetTimeout) timeout = this->timeout();
  // Inference tensors may be written to in inference mode only, which is a thread's own.
  const bool inference = c10::InferenceMode::is_enabled() ||
                         std::any_of(results.begin(), results.end(), [](const at::Tensor& tensor) {
                           return tensor.defined() && tensor.is_inference();
                         });
  Turns::Body run = [this, timeout, inference, label = shm::Label::current(),
                     body = std::move(body)] {
    std::optional<c10::InferenceMode> inference_mode;
    if (inference) inference_mode.emplace();
    const c10::NoGradGuard no_grad;
    const shm::Label whose(label);
    try {
      body(deadline_in(timeout));
    } catch (const RefusedByAll& refused) {
      std::rethrow_exception(refused.error);
    } catch (const shm::Error& error) {
      if (spans_hosts()) tell_other_hosts();
      TORCH_CHECK_WITH(DistBackendError, false, error.what());
    } catch (const std::exception& error) {
      // This rank may not have begun what the others are in.
      group_->abort("rank " + std::to_string(getRank()) + " failed: " + text_of(error));
      if (spans_hosts()) tell_other_hosts();
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

// The other hosts would wait for this rank's part: they learn of it by the closed connections.
void ShmBackend::tell_other_hosts() {
  close_connections();
  if (!lanes_.backend) return;
  // Waits for what is under way.
  turns_->enqueue([lane = std::exchange(lanes_.backend, {})]() mutable { lane.reset(); }, {});
}

// Ends what other ranks wait for in the other backend. That can not be asked to, but closes its
// connections when a wait takes too long: here for a message that nobody sends.
void ShmBackend::close_connections() {
  Tensors nothing{at::empty({1}, at::kByte)};
  const int peer = (getRank() + 1) % getSize();
  try {
    inner_->recv(nothing, peer, std::numeric_limits<int>::max())->wait(kShortest);
  } catch (const std::exception&) {  // as intended
  }
}

// Runs what another backend carries out once the ranks have found that they mean the same.
template <typename OpOptions, typename Launch>
c10::intrusive_ptr<c10d::Work> ShmBackend::hand_on(Handed call,
                                                   const OpOptions& options,
                                                   Launch launch) {
  refuse_overlaps(call.title, call.results);
  call.what.label = static_cast<std::int64_t>(shm::Label::current());
  Tensors results = call.results;
  return start(call.type, call.title, std::move(results), options.timeout, options.asyncOp,
               [this, call = std::move(call), launch = std::move(launch)](shm::Deadline deadline) {
                 compare(call, deadline);
                 Stand stand(!is_reduction(call.kind));  // gloo moves no complex numbers
                 const auto work = launch_together([&] { return launch(stand); }, deadline);
                 wait_for(work, deadline);
                 stand.give_back();
               });
}

// Tensors or lists of them, by a method of the other backend that reads some and writes others.
template <typename Outputs, typename Inputs, typename OpOptions>
c10::intrusive_ptr<c10d::Work> ShmBackend::hand_on(Handed call,
                                                   const Outputs& outputs,
                                                   const Inputs& inputs,
                                                   const OpOptions& options,
                                                   Moving<Outputs, Inputs, OpOptions> method) {
  return hand_on(std::move(call), options, [this, outputs, inputs, options, method](Stand& stand) {
    Inputs plain = stand.read(inputs);
    Outputs plain_outputs = stand.write(outputs);
    return (inner_.get()->*method)(plain_outputs, plain, options);
  });
}

// By a method of the other backend that works in place.
template <typename OpOptions>
c10::intrusive_ptr<c10d::Work> ShmBackend::hand_on(Handed call,
                                                   const OpOptions& options,
                                                   InPlace<OpOptions> method) {
  const Tensors tensors = call.results;
  return hand_on(std::move(call), options, [this, tensors, options, method](Stand& stand) {
    Tensors plain = stand.update(tensors);
    return (inner_.get()->*method)(plain, options);
  });
}

template <typename OpOptions>
c10::intrusive_ptr<c10d::Work> ShmBackend::hand_on_all_reduce(OpType type,
                                                              const Tensors& tensors,
                                                              const OpOptions& options,
                                                              InPlace<OpOptions> method) {
  const std::string what =
      "all_reduce " + text_of_sizes(tensors) + ", " + name_of(options.reduceOp);
  return hand_on({type, "shm:all_reduce", shm::Kind::kAllReduce, tensors, {what}}, options, method);
}

void ShmBackend::wait_for(const Work& work, shm::Deadline deadline) {
  try {
    HandedWork(work, group_).wait(time_left(deadline));
  } catch (const c10::DistError&) {
    throw;
  } catch (const c10::Error&) {
    // It refuses a dtype or an operation before it sends anything, and the ranks agree on those.
    throw RefusedByAll{std::current_exception()};
  }
}

// Throws unless all ranks have called the same.
void ShmBackend::compare(const Handed& call, shm::Deadline deadline) {
  const auto count = static_cast<std::size_t>(getSize());
  Particulars what = call.what;
  std::vector<std::string> everyones;
  if (spans_hosts()) {
    collectives_->announce(call.kind, static_cast<int>(call.root), deadline);
    what.number = static_cast<std::int64_t>(group_->count());
    everyones = exchange_across(what.packed(count), deadline);
  } else {
    collectives_->begin_elsewhere(call.kind, static_cast<int>(call.root), deadline);
    everyones = collectives_->exchange(what.packed(count));
  }
  std::vector<Particulars> all;
  for (const std::string& one : everyones) all.push_back(Particulars::unpacked(one, count));
  const std::string difference = difference_between(all);
  if (!difference.empty()) group_->fail("the ranks do not agree: " + difference);
}

// Returns what all ranks of all hosts gave, who all gave as many bytes.
std::vector<std::string> ShmBackend::exchange_across(const std::string& mine,
                                                     shm::Deadline deadline) {
  Tensors inputs{bytes_of(mine)};
  Lists outputs(1);
  for (int i = 0; i < getSize(); ++i) outputs[0].push_back(at::empty_like(inputs[0]));
  HandedWork(inner_->allgather(outputs, inputs, {}), group_).wait(time_left(deadline));
  std::vector<std::string> everyones;
  for (const at::Tensor& output : outputs[0]) everyones.push_back(text_in(output));
  return everyones;
}

// Has the ranks tell each other whether the other backend has accepted the call: where it refuses
// on one of them alone, the others would wait for that one.
template <typename Launch>
c10::intrusive_ptr<c10d::Work> ShmBackend::launch_together(const Launch& launch,
                                                           shm::Deadline deadline) {
  c10::intrusive_ptr<c10d::Work> work;
  std::exception_ptr error;
  Refusals refusals{.by_all = false};
  try {
    work = launch();
  } catch (const std::exception& thrown) {
    error = std::current_exception();
    refusals = {true, "rank " + std::to_string(getRank()) + " failed: " + text_of(thrown)};
  }
  refusals = sum_of(collectives_->exchange(refusals.packed()));
  if (spans_hosts()) {
    // The first rank of each host asks the other hosts, and tells its own.
    std::vector<std::string> hosts{refusals.packed()};
    if (group_->me() == 0) {
      const at::Tensor mine = bytes_of(hosts[0]);
      hosts.clear();
      for (const at::Tensor& host : Lane(lanes_, *group_, deadline).gather(mine))
        hosts.push_back(text_in(host));
    }
    refusals = Refusals::unpacked(collectives_->exchange(sum_of(hosts).packed())[0]);
  }
  if (error && refusals.by_all) throw RefusedByAll{error};
  if (error) std::rethrow_exception(error);
  if (!refusals.first.empty()) group_->fail(refusals.first);
  return work;
}

// Lets the others know of a call that does not happen, and waits for nobody.
void ShmBackend::announce(shm::Kind kind) {
  check_usable();
  launched_.fetch_add(1, std::memory_order_relaxed);
  const auto body = [this, kind, label = shm::Label::current()] {
    const shm::Label whose(label);
    collectives_->announce(kind, 0, deadline_in(timeout()));
  };
  if (!turns_->idle()) {
    turns_->submit(body, {});
    return;
  }
  as_torch_error([&] { turns_->run(body); });
}

// Refuses a call for this rank's arguments. Where all ranks refuse it, the group is as it was;
// others that did call hear that this one has refused, on other hosts with the next call here.
void ShmBackend::refuse(const std::string& why) {
  try {
    announce(shm::Kind::kRefused);
  } catch (const c10::Error&) {  // the group is broken, which the next collective will say
  }
  TORCH_CHECK_VALUE(false, "fastddp: rank ", getRank(), ": ", why);
}

void ShmBackend::refuse_overlaps(const char* title, const Tensors& written) {
  for (const at::Tensor& tensor : written) {
    if (!overlaps_itself(tensor)) continue;
    refuse(c10::str(title, ": a tensor of shape ", tensor.sizes(), " and strides ",
                    tensor.strides(),
                    ", into which it would write, has elements that overlap, in "
                    "the same memory (it was expanded, or made by as_strided); pass a clone()"));
  }
}

// ---- all_reduce ------------------------------------------------------------------------

bool ShmBackend::can_all_reduce(const at::Tensor& tensor, const ReduceOp& op) const {
  // A lane can carry what gloo can.
  return can_reduce(tensor, op) && !(spans_hosts() && tensor.scalar_type() == at::kShort);
}

void ShmBackend::all_reduce(const at::Tensor& tensor, const ReduceOp& op, shm::Deadline deadline) {
  const at::Tensor packed = to_read(tensor);
  const shm::Operand operand = operand_of(as_real(packed, op), tensor.scalar_type());
  const Reduction reduction = *reduction_of(op);
  if (spans_hosts()) {
    all_reduce_across(operand, reduction, deadline);
  } else {
    collectives_->all_reduce(operand, reduction, getSize(), deadline);
  }
  if (!packed.is_same(tensor)) tensor.copy_(packed);
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
  Crossing crossing({lanes_, *group_, deadline}, *group_, operand.element, reduction);
  collectives_->all_reduce_across(operand, reduction, getSize(),
                                  static_cast<std::size_t>(lanes_.count), crossing, staging,
                                  deadline);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allreduce(Tensors& tensors,
                                                     const c10d::AllreduceOptions& options) {
  if (tensors.size() != 1 || !can_all_reduce(tensors[0], options.reduceOp)) {
    return hand_on_all_reduce(OpType::ALLREDUCE, tensors, options, &Backend::allreduce);
  }
  refuse_overlaps("all_reduce", tensors);
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
    return hand_on_all_reduce(OpType::ALLREDUCE_COALESCED, tensors, options,
                              &Backend::allreduce_coalesced);
  }
  refuse_overlaps("all_reduce", tensors);
  return start(OpType::ALLREDUCE_COALESCED, "shm:all_reduce", tensors, options.timeout,
               options.asyncOp, [this, tensors, op = options.reduceOp](shm::Deadline deadline) {
                 for (const at::Tensor& tensor : tensors) all_reduce(tensor, op, deadline);
               });
}

// ---- broadcast, all_gather -------------------------------------------------------------

c10::intrusive_ptr<c10d::Work> ShmBackend::broadcast(Tensors& tensors,
                                                     const c10d::BroadcastOptions& options) {
  const int root = static_cast<int>(options.rootRank);
  if (tensors.size() != 1 || !can_move(tensors[0]) || spans_hosts()) {
    return hand_on({OpType::BROADCAST,
                    "shm:broadcast",
                    shm::Kind::kBroadcast,
                    tensors,
                    {with_root("broadcast", root) + text_of_sizes(tensors)},
                    root},
                   options, &Backend::broadcast);
  }
  if (root < 0 || root >= getSize())
    refuse(c10::str("broadcast from rank ", root, " in a group of ", getSize()));
  // The root's is only read, but nobody knows yet whether the ranks agree on the root.
  refuse_overlaps("broadcast", tensors);
  return start(OpType::BROADCAST, "shm:broadcast", tensors, options.timeout, options.asyncOp,
               [this, tensor = tensors[0], root](shm::Deadline deadline) {
                 const at::Tensor packed = to_read(tensor);
                 collectives_->broadcast(operand_of(packed), root, deadline);
                 if (!packed.is_same(tensor) && root != getRank()) tensor.copy_(packed);
               });
}

void ShmBackend::all_gather(const Tensors& outputs,
                            const at::Tensor& input,
                            shm::Deadline deadline) {
  const at::Tensor packed = to_read(input);
  Stand stand;
  std::vector<void*> addresses;
  for (const at::Tensor& output : stand.write(outputs)) addresses.push_back(output.data_ptr());
  collectives_->all_gather(operand_of(packed), addresses, deadline);
  stand.give_back();
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allgather(Lists& outputs,
                                                     Tensors& inputs,
                                                     const c10d::AllgatherOptions& options) {
  if (inputs.size() != 1 || outputs.size() != 1 || spans_hosts() || !can_move(inputs[0]) ||
      outputs[0].size() != static_cast<std::size_t>(getSize()) ||
      !same_size(outputs[0], inputs[0])) {
    return hand_on({OpType::ALLGATHER,
                    "shm:all_gather",
                    shm::Kind::kAllGather,
                    flat(outputs),
                    {"all_gather " + text_of_sizes(inputs)}},
                   outputs, inputs, options, &Backend::allgather);
  }
  refuse_overlaps("all_gather", outputs[0]);
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
  return allgather_into_tensor_coalesced(outputs, inputs, options);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allgather_coalesced(
    Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return hand_on({OpType::ALLGATHER_COALESCED,
                  "shm:all_gather",
                  shm::Kind::kAllGather,
                  flat(outputs),
                  {"all_gather " + text_of_sizes(inputs)}},
                 outputs, inputs, options, &Backend::allgather_coalesced);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  bool ours = !spans_hosts() && outputs.size() == inputs.size();
  for (std::size_t i = 0; ours && i < inputs.size(); ++i) {
    ours = can_move(inputs[i]) && can_move(outputs[i]) &&
           outputs[i].numel() == inputs[i].numel() * getSize() &&
           outputs[i].scalar_type() == inputs[i].scalar_type();
  }
  if (!ours) {
    Handed call{OpType::_ALLGATHER_BASE,
                "shm:all_gather",
                shm::Kind::kAllGather,
                outputs,
                {"all_gather " + text_of_sizes(inputs)}};
    return inputs.size() == 1 && outputs.size() == 1
               ? hand_on(std::move(call), outputs[0], inputs[0], options, &Backend::_allgather_base)
               : hand_on(std::move(call), outputs, inputs, options,
                         &Backend::allgather_into_tensor_coalesced);
  }
  refuse_overlaps("all_gather", outputs);
  return start(OpType::_ALLGATHER_BASE, "shm:all_gather", outputs, options.timeout, options.asyncOp,
               [this, outputs, inputs](shm::Deadline deadline) {
                 Stand stand;
                 for (std::size_t i = 0; i < inputs.size(); ++i)
                   all_gather(parts_of(stand.write(outputs[i]), getSize()), inputs[i], deadline);
                 stand.give_back();
               });
}

// ---- reduce_scatter --------------------------------------------------------------------

void ShmBackend::reduce_scatter(const at::Tensor& output,
                                const Tensors& inputs,
                                const at::Tensor& block,
                                const ReduceOp& op,
                                shm::Deadline deadline) {
  Stand stand;
  const at::Tensor packed = stand.write(output);
  const Tensors packed_inputs = stand.read(inputs);
  std::vector<void*> addresses;
  for (const at::Tensor& input : packed_inputs) addresses.push_back(input.data_ptr());
  collectives_->reduce_scatter(operand_of(as_real(packed, op), output.scalar_type()), addresses,
                               block.defined() ? block.const_data_ptr() : nullptr,
                               *reduction_of(op), getSize(), deadline);
  stand.give_back();
}

c10::intrusive_ptr<c10d::Work> ShmBackend::reduce_scatter(
    Tensors& outputs, Lists& inputs, const c10d::ReduceScatterOptions& options) {
  if (outputs.size() != 1 || inputs.size() != 1 || spans_hosts() ||
      !can_reduce(outputs[0], options.reduceOp) ||
      inputs[0].size() != static_cast<std::size_t>(getSize()) ||
      !same_size(inputs[0], outputs[0])) {
    // Ranks may take parts of different sizes, but each gives such a part to each.
    return hand_on(
        {OpType::REDUCE_SCATTER,
         "shm:reduce_scatter",
         shm::Kind::kReduceScatter,
         outputs,
         {"reduce_scatter " + text_of_sizes(flat(inputs)) + ", " + name_of(options.reduceOp)}},
        outputs, inputs, options, &Backend::reduce_scatter);
  }
  refuse_overlaps("reduce_scatter", outputs);
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
    Handed call{OpType::_REDUCE_SCATTER_BASE,
                "shm:reduce_scatter",
                shm::Kind::kReduceScatter,
                outputs,
                {"reduce_scatter " + text_of_sizes(inputs) + ", " + name_of(options.reduceOp)}};
    return inputs.size() == 1 && outputs.size() == 1
               ? hand_on(std::move(call), outputs[0], inputs[0], options,
                         &Backend::_reduce_scatter_base)
               : hand_on(std::move(call), outputs, inputs, options,
                         &Backend::reduce_scatter_tensor_coalesced);
  }
  refuse_overlaps("reduce_scatter", outputs);
  return start(OpType::_REDUCE_SCATTER_BASE, "shm:reduce_scatter", outputs, options.timeout,
               options.asyncOp,
               [this, outputs, inputs, op = options.reduceOp](shm::Deadline deadline) {
                 for (std::size_t i = 0; i < inputs.size(); ++i) {
                   const at::Tensor block = to_read(inputs[i]);
                   reduce_scatter(outputs[i], parts_of(block, getSize()), block, op, deadline);
                 }
               });
}

// ---- the rest --------------------------------------------------------------------------

c10::intrusive_ptr<c10d::Work> ShmBackend::barrier(const c10d::BarrierOptions& options) {
  if (spans_hosts()) {
    return hand_on({OpType::BARRIER, "shm:barrier", shm::Kind::kBarrier, {}, {"barrier"}}, options,
                   [this, options](Stand&) { return inner_->barrier(options); });
  }
  return start(OpType::BARRIER, "shm:barrier", {}, options.timeout, options.asyncOp,
               [this](shm::Deadline deadline) { collectives_->barrier(deadline); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::allreduce_sparse(Tensors& tensors,
                                                            const c10d::AllreduceOptions& options) {
  return hand_on_all_reduce(OpType::_ALLREDUCE_SPARSE, tensors, options,
                            &Backend::allreduce_sparse);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::reduce(Tensors& tensors,
                                                  const c10d::ReduceOptions& options) {
  return hand_on({OpType::REDUCE,
                  "shm:reduce",
                  shm::Kind::kReduce,
                  tensors,
                  {with_root("reduce", options.rootRank) + text_of_sizes(tensors) + ", " +
                   name_of(options.reduceOp)},
                  options.rootRank},
                 options, &Backend::reduce);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::gather(Lists& outputs,
                                                  Tensors& inputs,
                                                  const c10d::GatherOptions& options) {
  return hand_on({OpType::GATHER,
                  "shm:gather",
                  shm::Kind::kGather,
                  flat(outputs),
                  {with_root("gather", options.rootRank) + text_of_sizes(inputs)},
                  options.rootRank},
                 outputs, inputs, options, &Backend::gather);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::scatter(Tensors& outputs,
                                                   Lists& inputs,
                                                   const c10d::ScatterOptions& options) {
  return hand_on({OpType::SCATTER,
                  "shm:scatter",
                  shm::Kind::kScatter,
                  outputs,
                  {with_root("scatter", options.rootRank) + text_of_sizes(outputs)},
                  options.rootRank},
                 outputs, inputs, options, &Backend::scatter);
}

c10::intrusive_ptr<c10d::Work> ShmBackend::alltoall_base(at::Tensor& output,
                                                         at::Tensor& input,
                                                         std::vector<std::int64_t>& output_splits,
                                                         std::vector<std::int64_t>& input_splits,
                                                         const c10d::AllToAllOptions& options) {
  try {
    check_splits(output, output_splits, getSize());
    check_splits(input, input_splits, getSize());
  } catch (const c10::Error& error) {
    refuse(text_of(error));
  }
  Particulars what{"all_to_all of " + name_of(input.scalar_type())};
  what.gives = elements_of_splits(input, input_splits, getSize());
  what.takes = elements_of_splits(output, output_splits, getSize());
  return hand_on({OpType::ALLTOALL_BASE, "shm:all_to_all", shm::Kind::kAllToAll, {output}, what},
                 options,
                 [this, output, input, output_splits, input_splits, options](Stand& stand) {
                   at::Tensor plain = stand.read(input);
                   at::Tensor plain_output = stand.write(output);
                   auto to = input_splits, from = output_splits;
                   return inner_->alltoall_base(plain_output, plain, from, to, options);
                 });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::alltoall(Tensors& outputs,
                                                    Tensors& inputs,
                                                    const c10d::AllToAllOptions& options) {
  Particulars what{"all_to_all of " + names_of_dtypes(inputs)};
  for (const at::Tensor& input : inputs) what.gives.push_back(input.numel());
  for (const at::Tensor& output : outputs) what.takes.push_back(output.numel());
  return hand_on({OpType::ALLTOALL, "shm:all_to_all", shm::Kind::kAllToAll, outputs, what}, outputs,
                 inputs, options, &Backend::alltoall);
}

// Not collectives: the ranks that take no part do not hear of these.

// One end of a message. Gloo ends the process that gets more than it has room for, and leaves the
// rest of what is too large as it was.
template <typename Launch>
c10::intrusive_ptr<c10d::Work> ShmBackend::message(
    shm::End end, const Tensors& tensors, int peer, int tag, const Launch& launch) {
  check_usable();
  const std::size_t place = group_->index_of(peer);
  const bool is_known = place < group_->size() && place != group_->me() && tag >= 0 &&
                        tensors.size() == 1 && can_move(tensors[0]);
  if (!is_known) return c10::make_intrusive<HandedWork>(launch(), group_);
  const std::lock_guard lock(messages_mutex_);
  const std::uint64_t mine = tensors[0].nbytes();
  const auto theirs = messages_->announce(end, place, static_cast<std::uint32_t>(tag), mine);
  if (theirs && *theirs != mine) {
    const bool sends = end == shm::End::kSender;
    group_->abort(c10::str("the ranks do not agree: with tag ", tag, ", rank ",
                           sends ? getRank() : peer, " sends ", sends ? mine : *theirs,
                           " bytes to rank ", sends ? peer : getRank(), ", which receives ",
                           sends ? *theirs : mine));
    close_connections();
    as_torch_error([&] { group_->check(); });
  }
  try {
    return c10::make_intrusive<HandedWork>(launch(), group_);
  } catch (...) {
    messages_->withdraw();
    throw;
  }
}

c10::intrusive_ptr<c10d::Work> ShmBackend::send(Tensors& tensors, int to, int tag) {
  Tensors plain;
  for (const at::Tensor& tensor : tensors) plain.push_back(to_read(tensor));
  return message(shm::End::kSender, plain, to, tag, [&] { return inner_->send(plain, to, tag); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::recv(Tensors& tensors, int from, int tag) {
  check_received(tensors);
  return message(shm::End::kReceiver, tensors, from, tag,
                 [&] { return inner_->recv(tensors, from, tag); });
}

c10::intrusive_ptr<c10d::Work> ShmBackend::recvAnysource(Tensors& tensors, int tag) {
  check_usable();
  check_received(tensors);
  const std::lock_guard lock(messages_mutex_);
  messages_->take_from_anybody(static_cast<std::uint32_t>(tag));
  return c10::make_intrusive<HandedWork>(inner_->recvAnysource(tensors, tag), group_);
}

// It compares for itself, and names who is missing.
void ShmBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  announce(shm::Kind::kMonitoredBarrier);
  inner_->monitoredBarrier(options, wait_all_ranks);
}

}  // namespace fastddp
