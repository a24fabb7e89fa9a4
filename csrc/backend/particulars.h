// What the ranks of a collective that another backend carries out have to agree on. That backend
// compares nothing, and ends the process that gets more than it has room for.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastddp {

struct Particulars {
  std::string text;        // as in messages: "reduce with root 0 of 4 float32, sum"
  std::int64_t label = 0;  // as in shm/label.h
  // Of collectives so far, where the group spans hosts: one of them may have refused a call.
  std::int64_t number = 0;
  // For all_to_all: the elements that this rank gives to, and takes from, each rank.
  std::vector<std::int64_t> gives;
  std::vector<std::int64_t> takes;

  // A text longer than this is cut, and ends in a checksum of the whole.
  static constexpr std::size_t kTextBytes = 400;
  static std::size_t bytes(std::size_t ranks) {
    return kTextBytes + sizeof(std::int64_t) * (2 + 2 * ranks);
  }

  // bytes(ranks) bytes for another rank.
  std::string packed(std::size_t ranks) const;
  // Never throws: what was not made by packed() agrees with nothing.
  static Particulars unpacked(const std::string& bytes, std::size_t ranks);
};

std::string name_of(at::ScalarType dtype);
std::string name_of(const c10d::ReduceOp& op);

// "of 4 float32", "of 3 tensors, 5 float32, 5 float32, 2 int64", or
// "of a sparse tensor of shape [4, 3] and float32".
std::string text_of_sizes(const std::vector<at::Tensor>& tensors);

// The dtypes of some tensors, each once and in order, such as "float32, int64".
std::string names_of_dtypes(const std::vector<at::Tensor>& tensors);

// What the first two ranks that do not agree called; empty if all agree. `all` by rank.
std::string difference_between(const std::vector<Particulars>& all);

}  // namespace fastddp
