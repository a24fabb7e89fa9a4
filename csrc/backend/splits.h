// How a tensor is cut in its first dimension into a part for each rank.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Utils.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastddp {

// `splits`: the number of rows of each part; evenly if there are none. Throws if they do not fit.
inline void check_splits(const at::Tensor& tensor,
                         const std::vector<std::int64_t>& splits,
                         int ranks) {
  c10d::checkSplitSizes(splits, tensor, ranks);
  for (const std::int64_t rows : splits) TORCH_CHECK_VALUE(rows >= 0, "a split size is ", rows);
}

// Returns the number of elements in each part.
inline std::vector<std::int64_t> elements_of_splits(const at::Tensor& tensor,
                                                    const std::vector<std::int64_t>& splits,
                                                    int ranks) {
  if (splits.empty())
    return std::vector<std::int64_t>(static_cast<std::size_t>(ranks), tensor.numel() / ranks);
  const std::int64_t row = tensor.numel() / std::max<std::int64_t>(tensor.size(0), 1);
  std::vector<std::int64_t> elements;
  for (const std::int64_t rows : splits) elements.push_back(rows * row);
  return elements;
}

}  // namespace fastddp
