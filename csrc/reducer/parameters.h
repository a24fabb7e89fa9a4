// The parameters of a model, as the ranks have compared them and as autograd's hooks see them.
//
// Invariant: a parameter that has become another is found before the next round, so that no
// gradient is written in a layout that the ranks have not compared.
// (tests/parity/test_changed_models.py)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/variable.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/plan.h"
#include "reducer/places.h"
#include "tensor/layout.h"

namespace torch::autograd {
struct FunctionPostHook;
}

namespace fastddp {

struct Parameter {
  // Named by the compiler: torch has changed the smart pointer's type before.
  using NodePtr =
      decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));

  // Has autograd call the hook after each gradient that it has accumulated.
  void hook_with(std::unique_ptr<torch::autograd::FunctionPostHook> hook);
  // Removes the hook, so that a parameter that has become another gets a node that fits.
  void unhook();
  // Whether it has another layout, dtype, device or gradient node than when it was hooked.
  bool has_become_another() const;

  // Notes what `.grad` is now as what a backward that was not synchronised has left there.
  void note_left();
  void forget_left();
  // Whether this gradient is what such a backward has left.
  bool is_accumulated(const at::Tensor& grad) const;

  // The gradient in the parameter's shape, whatever the script has made of it; and where it lies in
  // the bucket, either exactly in the slot or no longer there. Throws if it has not as many
  // elements as the parameter; `rank` is for the message.
  at::Tensor fitting(at::Tensor grad, int rank) const;

  at::Tensor variable;
  std::string name;
  Layout layout;           // as it was when the ranks were compared
  std::size_t bucket = 0;  // of the installed plan, if the gradients are dense
  Place place;
  bool used = true;  // whether any rank had a gradient, when a flag was last read
  int expected = 1;  // gradients per round: the most that there have been

 private:
  NodePtr accumulator_;  // the tensor itself holds only a weak reference
  std::uintptr_t hook_ = 0;
  // What unsynchronised backwards have left, so long as nobody replaces or drops it.
  c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> accumulated_{
      c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>()};
};

// All parameters of one reducer: on one device, first those with dense gradients, then those with
// sparse ones.
class Parameters {
 public:
  // Throws if their number is not that of the names, or if a dtype is not one for gradients.
  Parameters(std::vector<at::Tensor> variables,
             std::vector<std::string> names,
             std::size_t num_sparse);

  std::size_t size() const { return all_.size(); }
  std::size_t num_dense() const { return specs_.size(); }
  bool is_dense(std::size_t index) const { return index < specs_.size(); }
  Parameter& operator[](std::size_t index) { return all_[index]; }
  const Parameter& operator[](std::size_t index) const { return all_[index]; }
  Parameter& operator[](const SlotPlan& slot) { return all_[static_cast<std::size_t>(slot.param)]; }
  const Parameter& operator[](const SlotPlan& slot) const {
    return all_[static_cast<std::size_t>(slot.param)];
  }
  auto begin() { return all_.begin(); }
  auto end() { return all_.end(); }
  auto begin() const { return all_.begin(); }
  auto end() const { return all_.end(); }

  // What a plan is made from: the dense parameters.
  const std::vector<ParamSpec>& specs() const { return specs_; }
  bool any_requires_grad() const;
  bool any_has_become_another() const;
  // Drops all references to the memory of buckets.
  void drop_places();

  // Whether the model has changed, so that the gradients belong to the reducer that comes after
  // this one: `.grad` is then neither taken nor written. (tests/parity/test_changed_models.py)
  bool retired = false;

 private:
  std::vector<Parameter> all_;
  std::vector<ParamSpec> specs_;
};

}  // namespace fastddp
