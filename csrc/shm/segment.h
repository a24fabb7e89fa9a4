// Anonymous shared memory: memfds, which have no name in the file system and end with the last
// process that has them open or mapped, however that process ends.
//
// A peer opens the segment through /proc/PID/fd/N, which the kernel allows only to processes of the
// same user and to more privileged ones. The nonce proves that the peer has opened the right
// segment, since the pid may belong to another process by then, or to one in another namespace.
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

// A random number of 128 bits, which nobody else draws.
struct Nonce {
  std::uint64_t high = 0;
  std::uint64_t low = 0;

  static Nonce draw();
  friend bool operator==(const Nonce&, const Nonce&) = default;
};

// What a peer needs to know to open a segment.
struct Address {
  pid_t pid = 0;
  int fd = -1;
  std::uint64_t bytes = 0;
  Nonce nonce;

  friend bool operator==(const Address&, const Address&) = default;
};

// Owns a readable and writable mapping of a segment. The first bytes of a segment are its nonce.
class Segment {
 public:
  // Makes a zeroed segment of `bytes` bytes and mode 0600. It can neither shrink nor grow, because
  // an access beyond its end would raise SIGBUS. Pages are taken from the system when they are
  // first touched. Throws Error, with the size in its text.
  static Segment create(const char* name, std::size_t bytes);

  // Maps the segment of a peer. Throws Error, with the reason in its text.
  static Segment open(const Address& address);

  Segment() = default;
  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&& other) noexcept;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

  // Valid until close_fd(), and only in the process that made the segment.
  Address address() const;

  // Closes the descriptor. To be called once every peer has mapped the segment: from then on no
  // other process can open it.
  void close_fd() { fd_ = Fd(); }

  // Gives the pages of a range back to the system, for every process that maps the segment. The
  // range then reads as zeros.
  void discard(std::size_t offset, std::size_t bytes) const;

 private:
  Segment(Fd fd, std::size_t bytes);

  Fd fd_;
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fastddp::shm
