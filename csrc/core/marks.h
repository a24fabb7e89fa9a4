// What ranks tell each other at the tail of a bucket, beside its gradients and their flags.
//
// A mark is one element, 0 or 1 before the reduction and non-zero after it when any rank has set
// it, in any dtype and for any number of ranks. One says that a rank's model has changed since it
// was wrapped. The others spell the bucket's label, two marks for each of its bits, of which a rank
// sets one: if both come back, the ranks have added up different buckets. `fastddp/engine/marks.py`
// is the same in Python; tests/unit/test_marks.py compares them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastddp {

inline constexpr std::size_t kLabelBits = 16;
inline constexpr std::size_t kNumMarks = 1 + 2 * kLabelBits;
using Marks = std::array<double, kNumMarks>;

// 16 bits that say which collective of a round, of which model, this is.
constexpr std::uint32_t label_of(std::uint32_t owner, std::uint32_t launch) {
  return ((owner ^ launch * 0x9E3779B1U) * 0x85EBCA6BU) >> 16;
}

// What a rank sends.
constexpr Marks marks_of(std::uint32_t label, bool has_changed) {
  Marks marks{};
  marks[0] = has_changed ? 1 : 0;
  for (std::size_t bit = 0; bit < kLabelBits; ++bit) marks[1 + 2 * bit + (label >> bit & 1U)] = 1;
  return marks;
}

// Whether the model of any rank has changed.
inline bool any_changed(const double* marks) { return marks[0] != 0; }

// Whether another rank's bucket had another label.
inline bool is_mixed(std::uint32_t label, const double* marks) {
  for (std::size_t bit = 0; bit < kLabelBits; ++bit) {
    if (marks[1 + 2 * bit + (~label >> bit & 1U)] != 0) return true;
  }
  return false;
}

}  // namespace fastddp
