#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "backend/particulars.h"

namespace fastddp {

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

  // Of all the ranks that packed them.
  static Refusals sum_of(const std::vector<std::string>& parts) {
    Refusals sum;
    for (const std::string& part : parts) sum.add(unpacked(part));
    return sum;
  }
};

}  // namespace fastddp
