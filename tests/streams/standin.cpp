// Two devices for tests, on torch's PrivateUse1: memory of the host, operators that run at once on
// the CPU, and streams and events that only tell a checker what was ordered. See checker.h.
//
// An operator comes to run_on_cpu(), where each of its tensors is replaced by a CPU tensor over the
// same memory; the schema tells what it reads and writes.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "checker.h"

// Declared in <torch/csrc/autograd/graph_task.h>, which takes longer to compile than all of this.
namespace torch::autograd {
TORCH_API int get_current_graph_task_id();
}

namespace standin {
namespace {

namespace py = pybind11;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kNumDevices = 2;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// Never freed: blocks of memory outlive static objects.
Checker& checker() {
  static auto* const instance = new Checker();
  return *instance;
}

thread_local DeviceIndex current_device = 0;
// By device. The default stream of a device has its number, and others leave its remainder.
thread_local std::array<std::size_t, kNumDevices> current_streams{0, 1};
std::atomic<bool> capturing{false};
// Names what a test or the group of the tests does in several operators.
thread_local std::vector<std::string> labels;

DeviceIndex valid(DeviceIndex index) {
  TORCH_CHECK(index < kNumDevices, "there are ", int{kNumDevices}, " stand-in devices");
  return index < 0 ? current_device : index;
}
Device as_device(DeviceIndex index) { return {DeviceType::PrivateUse1, valid(index)}; }
std::size_t& current_stream(DeviceIndex index = current_device) {
  return current_streams.at(static_cast<std::size_t>(valid(index)));
}
Stream as_stream(std::size_t id) {
  return Stream(Stream::UNSAFE, as_device(static_cast<DeviceIndex>(id % kNumDevices)),
                static_cast<c10::StreamId>(id));
}
std::size_t as_id(const Stream& stream) { return static_cast<std::size_t>(stream.id()); }

// Makes a device current for what is done here, as every operator does with that of its tensors.
class OnDevice {
 public:
  explicit OnDevice(Device device) {
    if (device.type() == DeviceType::PrivateUse1) current_device = valid(device.index());
  }
  ~OnDevice() { current_device = saved_; }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const DeviceIndex saved_ = current_device;
};

Launch launch(const std::string& op) {
  return checker().launch(current_stream(), labels.empty() ? op : labels.back() + " (" + op + ")");
}

// ---- what the host waits for ---------------------------------------------------------------

// The line of Python that is being run. Torch has let go of the GIL by now, but the frame stays.
std::string python_place() {
  const py::gil_scoped_acquire gil;
  PyFrameObject* const frame = PyEval_GetFrame();
  if (frame == nullptr) return "C++, called by autograd";
  const py::object code =
      py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  return py::str(code.attr("co_filename")).cast<std::string>() + ":" +
         std::to_string(PyFrame_GetLineNumber(frame)) + " in " +
         py::str(code.attr("co_name")).cast<std::string>();
}

void note_host_sync(const std::string& what) {
  checker().add_sync({what, python_place(), torch::autograd::get_current_graph_task_id() != -1});
}

void wait_for_stream(std::size_t stream, const std::string& what) {
  note_host_sync(what);
  checker().host_waits(checker().record(stream));
}

// ---- memory --------------------------------------------------------------------------------

struct Block {
  Shadow shadow;
  at::DataPtr memory;  // of the CPU's allocator
};

void free_block(void* context) {
  auto* const block = static_cast<Block*>(context);
  checker().free(block->shadow);
  delete block;
}

at::DataPtr make_block(at::DataPtr memory, std::size_t num_bytes) {
  void* const data = memory.get();
  auto* const block = new Block{checker().allocate(num_bytes, current_stream()), std::move(memory)};
  return {data, block, &free_block, as_device(current_device)};
}

struct Allocator final : c10::Allocator {
  at::DataPtr allocate(std::size_t num_bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(num_bytes);
    if (num_bytes != 0) std::memset(memory.get(), 0xff, num_bytes);  // NaN
    return make_block(std::move(memory), num_bytes);
  }
  void copy_data(void* dest, const void* src, std::size_t count) const override {
    std::memcpy(dest, src, count);
  }
};
Allocator allocator;

Block* block_of(const c10::DataPtr& memory) {
  return memory.get_deleter() == &free_block ? static_cast<Block*>(memory.get_context()) : nullptr;
}

std::optional<Range> range_of(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return std::nullopt;
  std::int64_t first = tensor.storage_offset();
  std::int64_t last = first;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const std::size_t itemsize = tensor.itemsize();
  return Range{static_cast<std::size_t>(first) * itemsize,
               static_cast<std::size_t>(last + 1) * itemsize};
}

void note_read(const at::Tensor& tensor, const Launch& launch) {
  const auto range = range_of(tensor);
  if (range) checker().read(block_of(tensor.storage().data_ptr())->shadow, *range, launch);
}

void note_write(const at::Tensor& tensor, const Launch& launch) {
  const auto range = range_of(tensor);
  if (range) checker().write(block_of(tensor.storage().data_ptr())->shadow, *range, launch);
}

// ---- operators -----------------------------------------------------------------------------

bool is_ours(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::PrivateUse1;
}

// The tensors of one call and what stands for them on the CPU. Tensors that share a storage do so
// there too, and a tensor that comes twice is one there too.
class Doubles {
 public:
  at::Tensor of(const at::Tensor& tensor) {
    if (!is_ours(tensor)) return tensor;
    for (const auto& [ours, cpu] : tensors_)
      if (ours.is_same(tensor)) return cpu;
    const c10::Storage storage = storage_of(tensor.storage());
    auto cpu = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    auto* const impl = cpu.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) impl->_set_conj(true);
    if (tensor.is_neg()) impl->_set_neg(true);
    tensors_.emplace_back(tensor, cpu);
    return cpu;
  }

  // What the operator returned, on our device: one of its arguments, a view of one, or new.
  at::Tensor back(const at::Tensor& cpu, const Launch& launch) {
    if (!cpu.defined() || cpu.layout() != c10::kStrided) return cpu;
    for (const auto& [ours, double_] : tensors_)
      if (double_.is_same(cpu)) return ours;
    for (const auto& [ours, double_] : storages_)
      if (double_.is_alias_of(cpu.storage())) return like(cpu, ours);
    const std::size_t num_bytes = cpu.storage().nbytes();
    at::Tensor result = like(cpu, adopt(cpu.storage()));
    if (num_bytes != 0)
      checker().write(block_of(result.storage().data_ptr())->shadow, {0, num_bytes}, launch);
    return result;
  }

  // An operator may have given an output another size, other memory (a larger one needs it) or
  // another argument's storage.
  void follow_changes(const Launch& launch) {
    for (const auto& [ours, cpu] : storages_) {
      if (cpu.data_ptr().get() == ours.data_ptr().get()) continue;
      const std::size_t num_kept = std::min(ours.nbytes(), cpu.nbytes());
      ours.set_data_ptr(take(cpu));
      if (num_kept != 0) checker().write(block_of(ours.data_ptr())->shadow, {0, num_kept}, launch);
      ours.set_nbytes(cpu.nbytes());
    }
    for (const auto& [ours, cpu] : tensors_) {
      auto* const impl = ours.unsafeGetTensorImpl();
      for (const auto& [storage, double_] : storages_)
        if (double_.is_alias_of(cpu.storage())) impl->set_storage_keep_dtype(storage);
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

 private:
  c10::Storage storage_of(const c10::Storage& storage) {
    for (const auto& [ours, cpu] : storages_)
      if (ours.is_alias_of(storage)) return cpu;
    void* const data = storage.data_ptr().get();
    c10::Storage cpu(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
        at::DataPtr(data, Device(DeviceType::CPU)), c10::GetCPUAllocator(), true));
    storages_.emplace_back(storage, cpu);
    return cpu;
  }

  // The memory of a storage of the CPU, as a block of the device's.
  static at::DataPtr take(const c10::Storage& cpu) {
    return make_block(cpu.set_data_ptr(at::DataPtr(nullptr, Device(DeviceType::CPU))),
                      cpu.nbytes());
  }

  static c10::Storage adopt(const c10::Storage& cpu) {
    return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), cpu.nbytes(), take(cpu), &allocator, true));
  }

  static at::Tensor like(const at::Tensor& cpu, const c10::Storage& storage) {
    auto ours = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), kKeys, cpu.dtype());
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(),
                                                      cpu.storage_offset());
    return ours;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// In-place operators that do not look at what they overwrite.
const std::unordered_set<std::string> kOverwrites{
    "aten::fill_",   "aten::zero_",      "aten::normal_",     "aten::uniform_",
    "aten::random_", "aten::bernoulli_", "aten::exponential_"};
// Operators that cannot return before the device has got there: their result's value, or shape, is
// the host's to know.
const std::unordered_set<std::string> kHostWaits{"aten::_local_scalar_dense", "aten::equal",
                                                 "aten::is_nonzero",          "aten::nonzero",
                                                 "aten::masked_select",       "aten::_unique2"};

// Operators that only change what a tensor refers to.
const std::unordered_set<std::string> kRefers{"aten::resize_", "aten::set_"};

bool is_written(const c10::Argument& argument) {
  const auto* const alias = argument.alias_info();
  if (alias == nullptr) return false;
  if (alias->isWrite()) return true;
  const auto& inner = alias->containedTypes();
  return !inner.empty() && inner.front().isWrite();
}

template <typename Visit>
void for_each_tensor(const c10::IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  } else if (value.isList()) {  // of optional tensors
    for (const c10::IValue& item : value.toListRef())
      if (item.isTensor()) visit(item.toTensor());
  }
}

template <typename Map>
c10::IValue map_tensors(const c10::IValue& value, const Map& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& tensor : value.toTensorVector()) mapped.push_back(map(tensor));
    return mapped;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const c10::IValue& item : value.toListRef()) {
      mapped.push_back(item.isTensor() ? std::optional<at::Tensor>(map(item.toTensor()))
                                       : std::nullopt);
    }
    return mapped;
  }
  return value;
}

// That of the first tensor which is on one; else what is asked for, as by a factory.
Device device_of(const torch::jit::Stack& stack, std::size_t begin) {
  std::optional<Device> found;
  for (std::size_t i = begin; i < stack.size() && !found; ++i) {
    for_each_tensor(stack[i], [&](const at::Tensor& tensor) {
      if (is_ours(tensor) && !found) found = tensor.device();
    });
  }
  for (std::size_t i = begin; i < stack.size() && !found; ++i)
    if (stack[i].isDevice()) found = stack[i].toDevice();
  return found.value_or(as_device(current_device));
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const std::string& name = schema.name();
  const std::size_t begin = stack->size() - arguments.size();
  const OnDevice guard_device(device_of(*stack, begin));
  const Launch now =
      launch(name + (schema.overload_name().empty() ? "" : ".") + schema.overload_name());
  const bool refers = kRefers.count(name) != 0;

  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = arguments[i];
    const bool is_view = argument.alias_info() != nullptr && !is_written(argument);
    const bool is_overwritten =
        is_written(argument) && (argument.kwarg_only() || kOverwrites.count(name) != 0);
    for_each_tensor((*stack)[begin + i], [&](const at::Tensor& tensor) {
      if (is_ours(tensor) && !refers && !is_view && !is_overwritten) note_read(tensor, now);
    });
  }
  Doubles doubles;
  std::vector<at::Tensor> written;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[begin + i];
    for_each_tensor(value, [&](const at::Tensor& tensor) {
      if (is_ours(tensor) && !refers && is_written(arguments[i])) written.push_back(tensor);
    });
    if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    } else {
      value = map_tensors(value, [&](const at::Tensor& t) { return doubles.of(t); });
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  doubles.follow_changes(now);
  for (const at::Tensor& tensor : written) note_write(tensor, now);
  for (std::size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    value = map_tensors(value, [&](const at::Tensor& t) { return doubles.back(t, now); });
  }
  if (kHostWaits.count(name) != 0) wait_for_stream(current_stream(), name);
}

at::Tensor empty(c10::SymIntArrayRef size,
                 std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout> /*layout*/,
                 std::optional<Device> device,
                 std::optional<bool> /*pin_memory*/,
                 std::optional<at::MemoryFormat> format) {
  const OnDevice guard(device.value_or(as_device(current_device)));
  return at::detail::empty_generic_symint(size, &allocator, kKeys, c10::dtype_or_default(dtype),
                                          format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> /*layout*/,
                         std::optional<Device> device,
                         std::optional<bool> /*pin_memory*/) {
  const OnDevice guard(device.value_or(as_device(current_device)));
  return at::detail::empty_strided_symint_generic(size, stride, &allocator, kKeys,
                                                  c10::dtype_or_default(dtype));
}

void wait_for(std::size_t stream, std::size_t other) {
  if (stream != other) checker().block(checker().record(other), stream);
}

// All copies to, from, on and between the devices. As in CUDA, one between two runs on the source's
// current stream, and the target's is ordered before and after it.
at::Tensor& copy(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  const OnDevice guard_device(is_ours(source) ? source.device() : target.device());
  const bool is_between = is_ours(source) && is_ours(target) && source.device() != target.device();
  const std::size_t other = is_between ? current_stream(target.get_device()) : current_stream();
  wait_for(current_stream(), other);
  const Launch now = launch("aten::copy_");
  if (is_ours(source)) note_read(source, now);
  if (is_ours(target)) note_write(target, now);
  Doubles doubles;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    doubles.of(target).copy_(doubles.of(source));
  }
  wait_for(other, current_stream());
  if (!non_blocking && is_ours(source) != is_ours(target))
    wait_for_stream(current_stream(), is_ours(source) ? "copy to the host" : "copy to the device");
  return target;
}

at::Tensor& set_source(at::Tensor& self,
                       at::Storage source,
                       c10::SymInt offset,
                       c10::SymIntArrayRef size,
                       c10::SymIntArrayRef stride) {
  auto* const impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                              offset.expect_int());
  return self;
}

void record_stream(at::Tensor& self, Stream stream) {
  if (Block* const block = block_of(self.storage().data_ptr()))
    checker().tell(block->shadow, as_id(stream));
}

// ---- streams and events ----------------------------------------------------------------------

struct Event {
  Clock clock;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device device) const override {
    return as_device(std::exchange(current_device, valid(device.index())));
  }
  Device getDevice() const override { return as_device(current_device); }
  void setDevice(Device device) const override { current_device = valid(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  DeviceIndex deviceCount() const noexcept override { return kNumDevices; }

  Stream getStream(Device device) const override {
    return as_stream(current_stream(device.index()));
  }
  Stream getDefaultStream(Device device) const override {
    return as_stream(static_cast<std::size_t>(valid(device.index())));
  }
  Stream getNewStream(Device device, int /*priority*/) const override {
    std::size_t id = checker().new_stream();
    while (as_stream(id).device_index() != valid(device.index())) id = checker().new_stream();
    return as_stream(id);
  }
  Stream getStreamFromGlobalPool(Device device, bool /*high*/) const override {
    return getNewStream(device, 0);
  }
  Stream exchangeStream(Stream stream) const override {
    return as_stream(std::exchange(current_stream(stream.device_index()), as_id(stream)));
  }
  void* getStreamNativeHandle(const Stream stream) const override {
    return reinterpret_cast<void*>(as_id(stream));
  }
  // What has not been waited for has not ended: the least that a device promises.
  bool queryStream(const Stream& stream) const override {
    return checker().host_knows(checker().record(as_id(stream)));
  }
  // Not marked as an override: an older torch does not ask.
  bool isStreamCapturing(const Stream& /*stream*/) const { return capturing; }
  void synchronizeStream(const Stream& stream) const override {
    wait_for_stream(as_id(stream), "stream.synchronize");
  }
  void synchronizeDevice(const DeviceIndex /*index*/) const override {
    note_host_sync("device synchronize");
    checker().host_waits_for_all();
  }

  void record(void** event,
              const Stream& stream,
              const DeviceIndex /*index*/,
              const c10::EventFlag /*flag*/) const override {
    if (*event == nullptr) *event = new Event();
    static_cast<Event*>(*event)->clock = checker().record(as_id(stream));
  }
  void block(void* event, const Stream& stream) const override {
    if (event != nullptr) checker().block(static_cast<Event*>(event)->clock, as_id(stream));
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || checker().host_knows(static_cast<Event*>(event)->clock);
  }
  void synchronizeEvent(void* event) const override {
    note_host_sync("event.synchronize");
    if (event != nullptr) checker().host_waits(static_cast<Event*>(event)->clock);
  }
  void destroyEvent(void* event, const DeviceIndex /*index*/) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const Stream& stream) const override {
    if (Block* const block = block_of(memory)) checker().tell(block->shadow, as_id(stream));
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex /*index*/) const override { return true; }
  DeviceIndex deviceCount() const override { return kNumDevices; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override { current_device = valid(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current_device, valid(index));
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return std::exchange(current_device, valid(index));
  }
  Device getDeviceFromPtr(void* /*data*/) const override { return as_device(current_device); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("record_stream", &record_stream);
}

}  // namespace
}  // namespace standin

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace standin;
  static auto* const hooks = new Hooks();
  at::RegisterPrivateUse1HooksInterface(hooks);
  m.def("name_stream", [](std::size_t stream, std::string name) {
    checker().name_stream(stream, std::move(name));
  });
  m.def("push_label", [](std::string label) { labels.push_back(std::move(label)); });
  m.def("pop_label", [] { labels.pop_back(); });
  m.def("num_devices", [] { return kNumDevices; });
  m.def("current_device", [] { return current_device; });
  m.def("set_capturing", [](bool value) { capturing = value; });
  m.def("take_findings", [] {
    std::vector<std::pair<std::string, std::string>> result;
    for (Finding& one : checker().take_findings())
      result.emplace_back(std::move(one.kind), std::move(one.text));
    return result;
  });
  m.def("take_host_syncs", [] {
    std::vector<std::tuple<std::string, std::string, bool>> result;
    for (HostSync& one : checker().take_syncs())
      result.emplace_back(std::move(one.what), std::move(one.where), one.in_backward);
    return result;
  });
}
