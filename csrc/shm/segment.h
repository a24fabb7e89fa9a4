// Anonymous shared memory: memfds, which no name leads to and which end with the last process that
// has them open or mapped, however it ends.
//
// A peer gets in through /proc/PID/fd/N. The kernel lets only processes of the same user (or more
// privileged ones) through there; the nonce proves that what was opened is what was meant, since a
// process number may be that of another process by then, or of one in another namespace.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace fastddp::shm {

// Owns a file descriptor.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept;
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd();

  int get() const { return fd_; }
  int release();

 private:
  int fd_;
};

// A number that nobody else draws.
struct Nonce {
  std::uint64_t high = 0;
  std::uint64_t low = 0;

  static Nonce draw();
  friend bool operator==(const Nonce&, const Nonce&) = default;
};

// What lets a peer open a segment.
struct Address {
  pid_t pid = 0;
  int fd = -1;
  std::uint64_t bytes = 0;
  Nonce nonce;

  friend bool operator==(const Address&, const Address&) = default;
};

// Owns a mapping of a segment, readable and writable, whose first bytes are its nonce.
class Segment {
 public:
  // Makes a segment of `bytes`, zeroed, mode 0600, that can neither shrink nor grow (or an access
  // could fault). Pages are taken from the system when they are first touched.
  // Throws Error that names the size.
  static Segment create(const char* name, std::size_t bytes);

  // Maps a peer's. Throws Error that says what is in the way.
  static Segment open(const Address& address);

  Segment() = default;
  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&& other) noexcept;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

  // Valid until close_fd(), on the segment's maker only.
  Address address() const;

  // Once every peer has it mapped, nobody else needs to get in.
  void close_fd() { fd_ = Fd(); }

  // Gives the pages of a range back to the system, for all who map it; they read as zeros then.
  void discard(std::size_t offset, std::size_t bytes) const;

 private:
  Segment(Fd fd, std::size_t bytes);

  Fd fd_;
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fastddp::shm
