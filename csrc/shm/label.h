// Whose collective is launched next. Two collectives of one kind and size that belong to different
// owners would otherwise be taken for the same one, and each owner would get the other's values.
//
// A label's high 32 bits say whose a collective is: 0 is the script itself, other numbers are given
// out by whoever calls name_owner(), alike on all ranks. The low 32 bits say what of it: a bucket's
// number, or kWhole.
#pragma once

#include <cstdint>
#include <string>

namespace fastddp::shm {

// Labels what this thread launches, for as long as it lives.
class Label {
 public:
  static constexpr std::uint32_t kWhole = ~std::uint32_t{0};  // of no bucket

  static constexpr std::uint64_t of(std::uint32_t owner, std::uint32_t what = kWhole) {
    return std::uint64_t{owner} << 32 | what;
  }
  static constexpr std::uint32_t owner_of(std::uint64_t label) {
    return static_cast<std::uint32_t>(label >> 32);
  }
  static constexpr std::uint32_t what_of(std::uint64_t label) {
    return static_cast<std::uint32_t>(label);
  }

  explicit Label(std::uint64_t label) : previous_(set(label)) {}
  ~Label() { set(previous_); }
  Label(const Label&) = delete;
  Label& operator=(const Label&) = delete;

  // This thread's; 0 if it has none.
  static std::uint64_t current();

  // Replaces this thread's label until the next call. Returns the one before.
  static std::uint64_t set(std::uint64_t label);

 private:
  const std::uint64_t previous_;
};

// How many owners are remembered; beyond, the lowest numbers are forgotten.
constexpr std::size_t kOwnersKept = 1024;

// What this process's messages call an owner, such as "model 'Critic' (the second one wrapped)".
void name_owner(std::uint32_t owner, const std::string& text);

// Such as "bucket 2 of model 'Critic' (the second one wrapped)". For messages.
std::string describe_label(std::uint64_t label);

}  // namespace fastddp::shm
