#include "backend/plain.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace fastddp {
namespace {

bool is_ordinary(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.is_cpu();
}

struct Dimension {
  std::int64_t stride = 0;
  std::int64_t size = 0;
};

// Where each element lies, counted from the first.
std::vector<std::int64_t> offsets_of(const std::vector<Dimension>& dimensions) {
  std::vector<std::int64_t> offsets{0};
  for (const Dimension& dimension : dimensions) {
    const std::size_t before = offsets.size();
    for (std::int64_t i = 1; i < dimension.size; ++i) {
      for (std::size_t k = 0; k < before; ++k) offsets.push_back(offsets[k] + i * dimension.stride);
    }
  }
  return offsets;
}

template <typename Action>
std::vector<at::Tensor> each(const std::vector<at::Tensor>& tensors, const Action& action) {
  std::vector<at::Tensor> results;
  for (const at::Tensor& tensor : tensors) results.push_back(action(tensor));
  return results;
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

bool overlaps_itself(const at::Tensor& tensor) {
  if (!is_ordinary(tensor) || tensor.is_non_overlapping_and_dense() || tensor.numel() < 2)
    return false;
  std::vector<Dimension> dimensions;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) dimensions.push_back({std::abs(tensor.stride(i)), tensor.size(i)});
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  if (dimensions.front().stride == 0) return true;
  std::int64_t extent = 0;  // from the first to the last element of the dimensions so far
  const bool are_nested =
      std::all_of(dimensions.begin(), dimensions.end(), [&](const Dimension& dimension) {
        const bool steps_over = dimension.stride > extent;
        extent += dimension.stride * (dimension.size - 1);
        return steps_over;
      });
  if (are_nested) return false;
  // More elements than places for them: no need to look at each.
  if (tensor.numel() > extent + 1) return true;
  std::vector<std::int64_t> offsets = offsets_of(dimensions);
  std::sort(offsets.begin(), offsets.end());
  return std::adjacent_find(offsets.begin(), offsets.end()) != offsets.end();
}

at::Tensor to_read(const at::Tensor& tensor) {
  return is_plain(tensor) ? tensor : tensor.resolve_conj().resolve_neg().contiguous();
}

at::Tensor to_write(const at::Tensor& tensor) {
  return is_plain(tensor) ? tensor : at::empty(tensor.sizes(), tensor.options());
}

at::Tensor Stand::lent(const at::Tensor& plain) const {
  return pairs_ && plain.is_complex() ? at::view_as_real(plain) : plain;
}

at::Tensor Stand::remember(const at::Tensor& tensor, const at::Tensor& in_its_place) {
  if (!in_its_place.is_same(tensor)) copies_.emplace_back(tensor, in_its_place);
  return lent(in_its_place);
}

at::Tensor Stand::read(const at::Tensor& tensor) const {
  return is_ordinary(tensor) ? lent(to_read(tensor)) : tensor;
}

at::Tensor Stand::write(const at::Tensor& tensor) {
  return is_ordinary(tensor) ? remember(tensor, to_write(tensor)) : tensor;
}

at::Tensor Stand::update(const at::Tensor& tensor) {
  return is_ordinary(tensor) ? remember(tensor, to_read(tensor)) : tensor;
}

Stand::Tensors Stand::read(const Tensors& tensors) const {
  return each(tensors, [&](const at::Tensor& tensor) { return read(tensor); });
}

Stand::Tensors Stand::write(const Tensors& tensors) {
  return each(tensors, [&](const at::Tensor& tensor) { return write(tensor); });
}

Stand::Tensors Stand::update(const Tensors& tensors) {
  return each(tensors, [&](const at::Tensor& tensor) { return update(tensor); });
}

std::vector<Stand::Tensors> Stand::read(const std::vector<Tensors>& lists) const {
  std::vector<Tensors> results;
  for (const Tensors& list : lists) results.push_back(read(list));
  return results;
}

std::vector<Stand::Tensors> Stand::write(const std::vector<Tensors>& lists) {
  std::vector<Tensors> results;
  for (const Tensors& list : lists) results.push_back(write(list));
  return results;
}

void Stand::give_back() {
  for (const auto& [tensor, in_its_place] : copies_) tensor.copy_(in_its_place);
}

}  // namespace fastddp
