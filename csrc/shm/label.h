// Labels, which say for whom a thread launches collectives. Without them, two collectives of the
// same kind and size that belong to different owners would be taken for one collective, and each
// owner would get the values of the other.
//
// The high 32 bits of a label are the owner: 0 is the script itself; the callers of name_owner()
// give out the other numbers, the same ones on all ranks. The low 32 bits are the number of one of
// the owner's buckets, or kWhole.
#pragma once

#include <cstdint>
#include <string>

namespace fastddp::shm {

// Labels what this thread launches for as long as the object lives.
class Label {
 public:
  static constexpr std::uint32_t kWhole = ~std::uint32_t{0};  // for a collective of no bucket

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

  // Returns the label of this thread, or 0 if it has none.
  static std::uint64_t current();

  // Replaces the label of this thread until the next call. Returns the previous label.
  static std::uint64_t set(std::uint64_t label);

 private:
  const std::uint64_t previous_;
};

// How many owners are remembered; beyond that, those with the lowest numbers are forgotten.
constexpr std::size_t kOwnersKept = 1024;

// Sets how the messages of this process name an owner, such as "model 'Critic' (the second one
// wrapped)".
void name_owner(std::uint32_t owner, const std::string& text);

// Returns text for messages, such as "bucket 2 of model 'Critic' (the second one wrapped)".
std::string describe_label(std::uint64_t label);

}  // namespace fastddp::shm
