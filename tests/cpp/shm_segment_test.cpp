#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "check.h"
#include "shm/error.h"
#include "shm/process.h"
#include "shm/segment.h"
#include "shm_ranks.h"

using fastddp::shm::Address;
using fastddp::shm::Error;
using fastddp::shm::Fd;
using fastddp::shm::Nonce;
using fastddp::shm::Process;
using fastddp::shm::Segment;

namespace {

constexpr std::size_t kBytes = 64 << 10;

std::string open_error(const Address& address) {
  try {
    Segment::open(address);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

pid_t dead_process() {
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(0);
  ::waitpid(pid, nullptr, 0);
  return pid;
}

}  // namespace

TEST(what_one_mapping_writes_another_reads) {
  const Segment made = Segment::create("test", kBytes);
  const Segment opened = Segment::open(made.address());
  CHECK(opened.size() == kBytes && opened.data() != made.data());
  CHECK(std::all_of(made.data() + sizeof(Nonce), made.data() + kBytes,
                    [](char byte) { return byte == 0; }));
  made.data()[kBytes - 1] = 7;
  CHECK(opened.data()[kBytes - 1] == 7);
}

TEST(a_segment_is_private_and_keeps_its_size) {
  const Segment made = Segment::create("test", kBytes);
  const int fd = made.address().fd;
  struct stat status = {};
  CHECK(::fstat(fd, &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  CHECK(status.st_uid == ::geteuid());
  CHECK(::ftruncate(fd, kBytes / 2) != 0);
  CHECK(::ftruncate(fd, kBytes * 2) != 0);
  CHECK((::fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
}

TEST(only_what_was_announced_is_opened) {
  const Segment made = Segment::create("test", kBytes);
  CHECK(open_error(made.address()).empty());
  Address wrong = made.address();
  wrong.nonce.low ^= 1;
  CHECK(ranks::has(open_error(wrong), "not the segment"));
  wrong = made.address();
  wrong.bytes *= 2;
  CHECK(ranks::has(open_error(wrong), "not the segment"));
  wrong = made.address();
  wrong.pid = dead_process();
  CHECK(ranks::has(open_error(wrong), "No such file"));
}

TEST(a_file_that_others_could_shrink_is_not_opened) {
  for (const unsigned flags : {0u, static_cast<unsigned>(MFD_ALLOW_SEALING)}) {
    const Fd fd(::memfd_create("test", MFD_CLOEXEC | flags));
    const Nonce nonce = Nonce::draw();
    CHECK(::ftruncate(fd.get(), kBytes) == 0);
    CHECK(::pwrite(fd.get(), &nonce, sizeof(nonce), 0) == sizeof(nonce));
    CHECK(ranks::has(open_error({::getpid(), fd.get(), kBytes, nonce}), "not the segment"));
  }
  char path[] = "/tmp/fastddp-test-XXXXXX";
  const Fd file(::mkstemp(path));
  ::unlink(path);
  const Nonce nonce = Nonce::draw();
  CHECK(::ftruncate(file.get(), kBytes) == 0);
  CHECK(::pwrite(file.get(), &nonce, sizeof(nonce), 0) == sizeof(nonce));
  CHECK(ranks::has(open_error({::getpid(), file.get(), kBytes, nonce}), "not the segment"));
}

TEST(once_closed_nobody_else_gets_in_and_who_is_in_stays) {
  Segment made = Segment::create("test", kBytes);
  const Address address = made.address();
  const Segment opened = Segment::open(address);
  made.close_fd();
  CHECK(!open_error(address).empty());
  made.data()[100] = 3;
  CHECK(opened.data()[100] == 3);
  made = Segment();
  CHECK(opened.data()[100] == 3);
}

TEST(a_segment_that_cannot_be_had_names_its_size) {
  try {
    Segment::create("test", std::size_t{1} << 62);
    CHECK(false);
  } catch (const Error& error) {
    CHECK(ranks::has(error.what(), std::to_string(std::size_t{1} << 62)));
  }
}

TEST(discarded_pages_read_as_zeros_in_every_mapping) {
  const Segment made = Segment::create("test", kBytes);
  const Segment opened = Segment::open(made.address());
  std::memset(made.data() + kBytes / 2, 1, kBytes / 2);
  made.discard(kBytes / 2, kBytes / 4);
  CHECK(opened.data()[kBytes / 2] == 0 && opened.data()[kBytes * 3 / 4 - 1] == 0);
  CHECK(opened.data()[kBytes * 3 / 4] == 1);
}

TEST(a_moved_segment_unmaps_and_closes_once) {
  const auto before = ranks::count_open_files();
  {
    Segment first = Segment::create("test", kBytes);
    Segment second(std::move(first));
    CHECK(first.data() == nullptr && second.data() != nullptr);
    first = std::move(second);
    CHECK(first.data() != nullptr);
    for (int i = 0; i < 10; ++i) open_error({::getpid(), first.address().fd, kBytes, {}});
  }
  CHECK(ranks::count_open_files() == before);
}

TEST(how_a_process_ended_is_told_before_and_after_it_is_collected) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::pause();
    ::_exit(0);
  }
  const Process process(pid);
  CHECK(!process.ended() && ranks::has(process.describe(), "is running"));
  ::kill(pid, SIGSTOP);
  ranks::wait_until([&] { return ranks::has(process.describe(), "is stopped"); });
  ::kill(pid, SIGKILL);
  ranks::wait_until([&] { return process.ended(); });
  CHECK(ranks::has(process.describe(), "was killed by signal 9 (Killed"));
  ::waitpid(pid, nullptr, 0);
  CHECK(process.ended());
  // Since Linux 6.15, the kernel also tells the status of a process that its parent has waited for.
  const std::string text = process.describe();
  CHECK(ranks::has(text, "was killed by signal 9 (Killed") || ranks::has(text, "has ended"));
  CHECK_THROWS(Process(dead_process()), Error);
}

TEST(an_exit_status_is_told) {
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(7);
  const Process process(pid);
  ranks::wait_until([&] { return process.ended(); });
  CHECK(ranks::has(process.describe(), "exited with status 7"));
  ::waitpid(pid, nullptr, 0);
}

int main() { return check::run(); }
