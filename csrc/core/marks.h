// The marks that ranks send each other at the end of a bucket, behind the gradients and flags.
//
// A mark is one element, 0 or 1 before the reduction and non-zero after it when any rank has set
// it, in any dtype and for any number of ranks. The first mark says that a rank's model has changed
// since it was wrapped. The others spell the bucket's label, with two marks for each bit, of which
// a rank sets one: if both come back set, the ranks have added up different buckets.
// `fastddp/engine/marks.py` has the same functions in Python; tests/unit/test_marks.py compares the
// two.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastddp {

inline constexpr std::size_t kLabelBits = 16;
inline constexpr std::size_t kNumMarks = 1 + 2 * kLabelBits;
using Marks = std::array<double, kNumMarks>;

// Returns 16 bits that identify a collective: the model that it belongs to, and its number among
// the launches of a round.
constexpr std::uint32_t label_of(std::uint32_t owner, std::uint32_t launch) {
  return ((owner ^ launch * 0x9E3779B1U) * 0x85EBCA6BU) >> 16;
}

// Returns the marks that a rank sends.
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
