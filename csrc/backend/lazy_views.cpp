// Lets conjugated and negated views reach the backend `shm` as what they are. Torch's dispatcher
// gives collectives a copy of such a view in its place, and what is written into the copy is lost:
// the operators' schemas do not say which tensors they write to.
#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace fastddp {
namespace {

bool is_ours(const c10::IValue& value) {
  static const auto type = c10::getCustomClassType<c10::intrusive_ptr<c10d::ProcessGroup>>();
  if (!value.isObject() || value.type() != type) return false;
  try {
    const auto group = value.toCustomClass<c10d::ProcessGroup>();
    return group->getBackend(c10::DeviceType::CPU)->getBackendName() == "shm";
  } catch (const c10::Error&) {  // it has no backend for the CPU
    return false;
  }
}

// A group of ours may have another backend for its other devices.
at::Tensor resolved(const at::Tensor& tensor, bool is_for_ours) {
  if (!tensor.defined() || (is_for_ours && tensor.is_cpu())) return tensor;
  return tensor.resolve_conj().resolve_neg();
}

// As torch's own fallback does, but for what goes to our backend.
void resolve(c10::IValue& value, bool is_for_ours) {
  if (value.isTensor()) {
    value = resolved(value.toTensor(), is_for_ours);
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorList();
    for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = resolved(tensors[i], is_for_ours);
  }
}

template <c10::DispatchKey key>
void hand_views_on(const c10::OperatorHandle& op,
                   c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const bool is_for_ours = std::any_of(arguments.begin(), arguments.end(), is_ours);
  for (std::size_t i = stack->size() - arguments.size(); i < stack->size(); ++i)
    resolve((*stack)[i], is_for_ours);
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, key), stack);
}

template <c10::DispatchKey key>
void implement(torch::Library& library) {
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_", "allgather_",
        "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
        "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "gather_",
        "scatter_", "alltoall_", "alltoall_base_", "send", "recv_", "recv_any_source_"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&hand_views_on<key>>());
}

}  // namespace

TORCH_LIBRARY_IMPL(c10d, Conjugate, library) { implement<c10::DispatchKey::Conjugate>(library); }
TORCH_LIBRARY_IMPL(c10d, Negative, library) { implement<c10::DispatchKey::Negative>(library); }

}  // namespace fastddp
