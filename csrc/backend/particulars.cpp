#include "backend/particulars.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <sstream>

#include "shm/label.h"

namespace fastddp {
namespace {

// FNV-1a.
std::uint64_t checksum_of(const std::string& text) {
  std::uint64_t sum = 0xcbf29ce484222325;
  for (const char c : text) sum = (sum ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return sum;
}

std::string shortened(const std::string& text) {
  if (text.size() < Particulars::kTextBytes) return text;
  std::ostringstream ending;
  ending << "... (checksum " << std::hex << checksum_of(text) << ")";
  return text.substr(0, Particulars::kTextBytes - 1 - ending.str().size()) + ending.str();
}

std::string said_by(std::size_t rank, const Particulars& what) {
  const auto label = static_cast<std::uint64_t>(what.label);
  return "rank " + std::to_string(rank) + " called " + what.text +
         (label == 0 ? "" : ", for " + shm::describe_label(label)) +
         (what.number == 0 ? "" : ", as collective " + std::to_string(what.number));
}

}  // namespace

std::string Particulars::packed(std::size_t ranks) const {
  std::vector<std::int64_t> numbers{label, number};
  for (std::vector<std::int64_t> list : {gives, takes}) {
    list.resize(ranks);
    numbers.insert(numbers.end(), list.begin(), list.end());
  }
  std::string result = shortened(text);
  result.resize(kTextBytes);
  result.append(reinterpret_cast<const char*>(numbers.data()),
                numbers.size() * sizeof(std::int64_t));
  return result;
}

Particulars Particulars::unpacked(const std::string& bytes, std::size_t ranks) {
  std::vector<std::int64_t> numbers(2 + 2 * ranks);
  Particulars result{.text = "something unreadable"};
  if (bytes.size() == Particulars::bytes(ranks)) {
    result.text = bytes.substr(0, std::min(bytes.find('\0'), kTextBytes));
    std::memcpy(numbers.data(), bytes.data() + kTextBytes, numbers.size() * sizeof(std::int64_t));
  }
  const auto first = numbers.begin() + 2;
  const auto middle = first + static_cast<std::ptrdiff_t>(ranks);
  result.label = numbers[0];
  result.number = numbers[1];
  result.gives.assign(first, middle);
  result.takes.assign(middle, numbers.end());
  return result;
}

std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

std::string name_of(const c10d::ReduceOp& op) {
  using Op = c10d::ReduceOp;
  switch (static_cast<Op::RedOpType>(op)) {
    case Op::SUM:
      return "sum";
    case Op::AVG:
      return "average";
    case Op::PRODUCT:
      return "product";
    case Op::MIN:
      return "minimum";
    case Op::MAX:
      return "maximum";
    case Op::BAND:
      return "bitwise and";
    case Op::BOR:
      return "bitwise or";
    case Op::BXOR:
      return "bitwise xor";
    case Op::PREMUL_SUM:
      return "sum after a factor";
    default:
      return "an unknown operation";
  }
}

std::string text_of_sizes(const std::vector<at::Tensor>& tensors) {
  const auto size = [](const at::Tensor& tensor) {
    const std::string dtype = name_of(tensor.scalar_type());
    if (tensor.layout() == at::kStrided) return std::to_string(tensor.numel()) + " " + dtype;
    // How many elements it has differs between ranks.
    return "a sparse tensor of shape " + c10::str(tensor.sizes()) + " and " + dtype;
  };
  if (tensors.size() == 1) return "of " + size(tensors.front());
  std::string text = "of " + std::to_string(tensors.size()) + " tensors";
  for (const at::Tensor& tensor : tensors) text += ", " + size(tensor);
  return text;
}

std::string names_of_dtypes(const std::vector<at::Tensor>& tensors) {
  std::set<std::string> names;
  for (const at::Tensor& tensor : tensors) names.insert(name_of(tensor.scalar_type()));
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string difference_between(const std::vector<Particulars>& all) {
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank].text == all[0].text && all[rank].label == all[0].label &&
        all[rank].number == all[0].number) {
      continue;
    }
    return said_by(0, all[0]) + ", " + said_by(rank, all[rank]);
  }
  for (std::size_t from = 0; from < all.size(); ++from) {
    for (std::size_t to = 0; to < all.size(); ++to) {
      const std::int64_t gives = all[from].gives[to], takes = all[to].takes[from];
      if (gives == takes) continue;
      return said_by(from, all[from]) + " and gives rank " + std::to_string(to) + " " +
             std::to_string(gives) + " elements, rank " + std::to_string(to) + " takes " +
             std::to_string(takes) + " from it";
    }
  }
  return {};
}

}  // namespace fastddp
