// Waits for works of transports that look neither for signals nor for anything else meanwhile.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <functional>
#include <string>

#include "core/slow_wait.h"

namespace fastddp {

// Waits until the work has ended, and calls `look_around` with how long that lasts already whenever
// kLookAround has passed. Throws what the work or `look_around` throws; after the latter the work
// may be waited for again. Only for works that the host waits for: others would be held up here.
void wait_looking_around(c10d::Work& work,
                         const std::function<void(std::chrono::nanoseconds)>& look_around);

// Waits until the work has ended, as a SlowWait once it lasts.
void wait_patiently(c10d::Work& work, const SlowWait::What& what, const std::string& text);

}  // namespace fastddp
