#include "reducer/parameters.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>

#include <algorithm>

#include "core/dtype.h"
#include "tensor/dtype.h"
#include "tensor/slot.h"

namespace fastddp {
namespace {

// How many parameters ahead a walk asks for what has left the caches since the last step.
constexpr std::size_t kAhead = 8;

}  // namespace

void Parameter::hook_with(std::unique_ptr<torch::autograd::FunctionPostHook> hook) {
  const bool trains = variable.requires_grad();
  variable.set_requires_grad(true);  // else there is no accumulator
  accumulator_ = torch::autograd::impl::grad_accumulator(variable);
  variable.set_requires_grad(trains);
  hook_ = accumulator_->add_post_hook(std::move(hook));
}

void Parameter::unhook() {
  if (accumulator_) accumulator_->del_post_hook(hook_);
  accumulator_.reset();
}

// Autograd makes another node where the parameter gets other memory by `set_`, or another dtype by
// `.data =`. The node is compared without taking hold of it: this runs for every parameter in every
// forward.
bool Parameter::has_become_another() const {
  if (!accumulator_ || !layout.is_that_of(variable)) return true;
  const auto* const meta = torch::autograd::impl::get_autograd_meta(variable);
  if (!meta) return true;
  const auto& node = meta->grad_accumulator_;
  if constexpr (requires { node._unsafe_get_target(); }) {
    return node._unsafe_get_target() != accumulator_.get();
  } else {
    return node.lock() != accumulator_;
  }
}

void Parameter::note_left() { accumulated_ = variable.grad().getIntrusivePtr(); }

void Parameter::forget_left() { accumulated_.reset(); }

bool Parameter::is_accumulated(const at::Tensor& grad) const {
  const auto left = accumulated_.lock();
  return left.defined() && left.get() == grad.unsafeGetTensorImpl();
}

at::Tensor Parameter::fitting(at::Tensor grad, int rank) const {
  const at::IntArrayRef sizes = layout.sizes;
  if (grad.sizes() != sizes) {
    TORCH_CHECK(grad.numel() == c10::multiply_integers(sizes), "fastddp: rank ", rank,
                ": parameter '", name, "' has shape ", sizes, ", but its .grad has shape ",
                grad.sizes(),
                "; set .grad to None or to a tensor of the parameter's shape before backward");
    grad = grad.reshape(sizes);
  }
  const bool overlaps = grad.is_alias_of(place.slot) &&
                        !(is_alias(grad, place.slot) && grad.strides() == place.slot.strides());
  return overlaps ? grad.clone() : grad;
}

Parameters::Parameters(std::vector<at::Tensor> variables,
                       std::vector<std::string> names,
                       std::size_t num_sparse) {
  TORCH_CHECK_VALUE(variables.size() == names.size() && num_sparse <= variables.size(),
                    "fastddp: ", variables.size(), " parameters, ", num_sparse,
                    " of them sparse, but ", names.size(), " names");
  const std::size_t num_dense = variables.size() - num_sparse;
  for (std::size_t i = 0; i < variables.size(); ++i) {
    const auto known = dtype_of(variables[i].scalar_type());
    TORCH_CHECK_TYPE(known, "fastddp: parameter '", names[i], "' has dtype ",
                     variables[i].scalar_type(),
                     "; gradients can be float32, float64, float16, bfloat16 or complex");
    if (i < num_dense) {
      specs_.push_back({static_cast<std::int64_t>(real_numel(variables[i])),
                        static_cast<std::int64_t>(size_of(*known)),
                        static_cast<std::int64_t>(*known)});
    }
    Parameter param;
    param.layout = Layout(variables[i]);
    param.variable = std::move(variables[i]);
    param.name = std::move(names[i]);
    all_.push_back(std::move(param));
  }
}

bool Parameters::any_requires_grad() const {
  return std::any_of(all_.begin(), all_.end(),
                     [](const Parameter& param) { return param.variable.requires_grad(); });
}

bool Parameters::any_has_become_another() const {
  for (std::size_t i = 0; i < all_.size(); ++i) {
    if (i + kAhead < all_.size()) prefetch(all_[i + kAhead].variable);
    if (all_[i].has_become_another()) return true;
  }
  return false;
}

void Parameters::drop_places() {
  for (Parameter& param : all_) param.place = Place();
}

}  // namespace fastddp
