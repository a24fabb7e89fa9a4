#include "tensor/patience.h"

#include <exception>
#include <optional>

namespace fastddp {

void wait_looking_around(c10d::Work& work,
                         const std::function<void(std::chrono::nanoseconds)>& look_around) {
  using std::chrono::steady_clock;
  const auto begin = steady_clock::now();
  while (true) {
    const auto look = steady_clock::now();
    try {
      work.wait(kLookAround);
      return;
    } catch (const Interruption&) {
      throw;
    } catch (const std::exception&) {
      // Each transport says in words of its own that the time is over. What comes early is an error
      // of the work, and one that comes late will come early the next time.
      if (steady_clock::now() - look < kLookAround / 2) throw;
      if (work.isCompleted()) {
        work.wait();
        return;
      }
    }
    look_around(steady_clock::now() - begin);
  }
}

void wait_patiently(c10d::Work& work, const SlowWait::What& what, const std::string& text) {
  std::optional<SlowWait> slow;
  wait_looking_around(work, [&](std::chrono::nanoseconds lasted) {
    if (!slow) slow.emplace(what, text, lasted);
    slow->look();
  });
}

}  // namespace fastddp
