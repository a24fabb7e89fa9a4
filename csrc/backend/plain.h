// Tensors as collectives need them: contiguous memory that holds the values themselves.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace fastddp {

// Whether two elements lie in the same memory, so that what is written to one shows in the other.
bool overlaps_itself(const at::Tensor& tensor);

// Contiguous, and without a conjugation or negation that is still to be done.
bool is_plain(const at::Tensor& tensor);

// A plain tensor with a tensor's values: the tensor itself if it is plain, else a copy.
at::Tensor to_read(const at::Tensor& tensor);

// As to_read(), for what is written over as a whole: a copy has no values yet.
at::Tensor to_write(const at::Tensor& tensor);

// What a collective gets in the place of its arguments, and how the results come back from there.
// Tensors of other layouts, or on other devices, go as they are.
class Stand {
 public:
  using Tensors = std::vector<at::Tensor>;

  // `pairs`: complex numbers go as pairs of real ones.
  explicit Stand(bool pairs = false) : pairs_(pairs) {}

  at::Tensor read(const at::Tensor& tensor) const;
  at::Tensor write(const at::Tensor& tensor);
  at::Tensor update(const at::Tensor& tensor);  // read, then written

  Tensors read(const Tensors& tensors) const;
  Tensors write(const Tensors& tensors);
  Tensors update(const Tensors& tensors);
  std::vector<Tensors> read(const std::vector<Tensors>& lists) const;
  std::vector<Tensors> write(const std::vector<Tensors>& lists);

  // Copies what was written into the tensors that it was written for.
  void give_back();

 private:
  at::Tensor remember(const at::Tensor& tensor, const at::Tensor& in_its_place);
  at::Tensor lent(const at::Tensor& plain) const;

  const bool pairs_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
};

}  // namespace fastddp
