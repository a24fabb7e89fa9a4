// A ring of events as Python makes it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/events.h"

namespace event_ring {

inline constexpr std::size_t kHeaderWords = 16;
inline constexpr std::size_t kEventWords = 4;

// In use from use() to the end; no thread may record then.
class Ring {
 public:
  explicit Ring(std::size_t capacity)
      : capacity_(capacity), words_(kHeaderWords + capacity * kEventWords) {
    words_[1] = capacity;
  }
  ~Ring() { fastddp::events::use(nullptr); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  void use() { fastddp::events::use(words_.data()); }
  std::uint64_t next() const { return words_[2]; }
  std::uint64_t word(std::size_t place, std::size_t word) const {
    return words_[kHeaderWords + place % capacity_ * kEventWords + word].load();
  }
  fastddp::events::Kind kind(std::size_t place) const {
    return static_cast<fastddp::events::Kind>(word(place, 1) & 0xFF);
  }
  std::uint64_t number(std::size_t place) const { return word(place, 1) >> 8 & 0xFFFFFF; }
  std::uint64_t owner(std::size_t place) const { return word(place, 1) >> 32; }

 private:
  const std::size_t capacity_;
  std::vector<std::atomic<std::uint64_t>> words_;
};

}  // namespace event_ring
