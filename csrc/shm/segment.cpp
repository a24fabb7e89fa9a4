#include "shm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "shm/error.h"

namespace fastddp::shm {
namespace {

std::string reason() { return std::strerror(errno); }

constexpr unsigned kNoExec = 8;  // MFD_NOEXEC_SEAL of Linux 6.3
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;

}  // namespace

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

int Fd::release() { return std::exchange(fd_, -1); }

Nonce Nonce::draw() {
  Nonce nonce;
  if (::getrandom(&nonce, sizeof(nonce), 0) != static_cast<ssize_t>(sizeof(nonce)))
    throw Error("getrandom: " + reason());
  return nonce;
}

Segment::Segment(Fd fd, std::size_t bytes) : fd_(std::move(fd)), size_(bytes) {
  void* data =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_.get(), 0);
  if (data == MAP_FAILED)
    throw Error("mapping " + std::to_string(bytes) + " bytes of shared memory: " + reason());
  data_ = static_cast<char*>(data);
  ::madvise(data_, size_, MADV_DONTDUMP);
}

Segment Segment::create(const char* name, std::size_t bytes) {
  // With the flag that newer kernels may require (sysctl vm.memfd_noexec), and without it for older
  // kernels, which do not know it.
  Fd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExec));
  if (fd.get() < 0) fd = Fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.get() < 0) throw Error("memfd_create: " + reason());
  if (::fchmod(fd.get(), 0600) != 0 || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    throw Error("making a shared memory segment of " + std::to_string(bytes) +
                " bytes: " + reason());
  }
  Segment segment(std::move(fd), bytes);
  const Nonce nonce = Nonce::draw();
  std::memcpy(segment.data_, &nonce, sizeof(nonce));
  return segment;
}

Segment Segment::open(const Address& address) {
  const std::string path =
      "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.fd);
  Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (fd.get() < 0) throw Error("opening " + path + ": " + reason());
  struct stat status = {};
  if (::fstat(fd.get(), &status) != 0) throw Error("fstat of " + path + ": " + reason());
  if (status.st_uid != ::geteuid())
    throw Error(path + " belongs to user " + std::to_string(status.st_uid) + ", this process to " +
                std::to_string(::geteuid()));
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);  // -1 for other kinds of files
  if (static_cast<std::uint64_t>(status.st_size) != address.bytes || seals < 0 ||
      (seals & kSeals) != kSeals) {
    throw Error(path + " is not the segment that was announced");
  }
  Segment segment(std::move(fd), address.bytes);
  segment.close_fd();
  if (std::memcmp(segment.data_, &address.nonce, sizeof(address.nonce)) != 0)
    throw Error(path + " is not the segment that was announced");
  return segment;
}

Segment::Segment(Segment&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Segment& Segment::operator=(Segment&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Segment::~Segment() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Address Segment::address() const {
  Address address{::getpid(), fd_.get(), size_, {}};
  std::memcpy(&address.nonce, data_, sizeof(address.nonce));
  return address;
}

void Segment::discard(std::size_t offset, std::size_t bytes) const {
  if (::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                  static_cast<off_t>(bytes)) != 0)
    std::memset(data_ + offset, 0, bytes);
}

}  // namespace fastddp::shm
