#pragma once

#include <algorithm>
#include <chrono>

namespace fastddp {

// The end of a timeout that begins now. Some say "never" by the largest number there is.
inline std::chrono::steady_clock::time_point deadline_in(std::chrono::milliseconds timeout) {
  constexpr std::chrono::milliseconds kLongest = std::chrono::hours(24 * 365);
  return std::chrono::steady_clock::now() + std::min(timeout, kLongest);
}

// How long it is to a deadline; at least a millisecond, since zero means no limit to some.
inline std::chrono::milliseconds time_left(std::chrono::steady_clock::time_point deadline) {
  const auto left = deadline - std::chrono::steady_clock::now();
  return std::max(std::chrono::ceil<std::chrono::milliseconds>(left), std::chrono::milliseconds(1));
}

}  // namespace fastddp
