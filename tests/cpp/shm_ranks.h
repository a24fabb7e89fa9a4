// Ranks of a group for tests: as threads over one mapping, so that a thread sanitizer sees one
// address for each byte, and as processes that find each other as real ranks do.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "shm/collectives.h"
#include "shm/group.h"
#include "shm/heap.h"
#include "shm/layout.h"
#include "shm/segment.h"

namespace ranks {

namespace shm = fastddp::shm;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// A deadline that no test reaches unless something hangs.
inline shm::Deadline soon() { return steady_clock::now() + std::chrono::seconds(30); }
inline shm::Deadline in(milliseconds time) { return steady_clock::now() + time; }

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline std::ptrdiff_t count_open_files() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return std::distance(begin(files), end(files));
}

// Waits until another thread or process has made the condition true.
template <typename Condition>
void wait_until(const Condition& condition) {
  const auto end = soon();
  while (!condition()) {
    if (steady_clock::now() > end) throw std::runtime_error("what was waited for did not come");
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

struct Rank {
  std::size_t me;
  std::size_t ranks;
  shm::Group& group;
  shm::Collectives& collectives;
};
using Body = std::function<void(Rank&)>;

inline shm::Segment make_control(std::size_t ranks) {
  auto segment = shm::Segment::create("test-group", shm::Layout::bytes(ranks));
  shm::Layout(segment.data(), ranks).construct();
  return segment;
}

// Returns the text of what each rank threw, or an empty one. A rank that throws breaks the group,
// so that no other rank waits for it.
inline std::vector<std::string> run_threads(std::size_t ranks, const Body& body) {
  const shm::Segment control = make_control(ranks);
  const shm::Layout layout(control.data(), ranks);
  const auto process = std::make_shared<const shm::Process>(::getpid());
  std::vector<shm::Member> members;
  for (std::size_t i = 0; i < ranks; ++i)
    members.push_back(
        {static_cast<int>(i), shm::Heap::mine().data(), shm::Heap::mine().size(), process});
  std::vector<std::string> errors(ranks);
  std::vector<std::thread> threads;
  for (std::size_t me = 0; me < ranks; ++me) {
    threads.emplace_back([&, me] {
      shm::Group group(layout, members, me);
      shm::Collectives collectives(group);
      Rank rank{me, ranks, group, collectives};
      try {
        body(rank);
      } catch (const std::exception& error) {
        errors[me] = error.what();
        group.abort(error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

inline void check_none(const std::vector<std::string>& errors) {
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

// The memory that the processes of a test share from before the fork.
struct Board {
  static constexpr std::size_t kRanks = 8;
  std::atomic<std::size_t> ready{0};
  shm::Address control;
  std::array<shm::Address, kRanks> heaps;
  std::atomic<std::uint64_t> progress{0};  // for the test's own use
  std::array<std::array<char, 4096>, kRanks> errors;
};

// Ranks as processes. To be made before the test has threads, because it forks.
class Processes {
 public:
  Processes(std::size_t ranks, const std::function<void(Rank&, Board&)>& body)
      : board_(new (::mmap(
            nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
                   Board{}) {
    for (std::size_t me = 0; me < ranks; ++me) {
      const pid_t pid = ::fork();
      if (pid == 0) {
        run(me, ranks, body);
        ::_exit(0);
      }
      pids_.push_back(pid);
    }
  }

  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  ~Processes() {
    for (std::size_t i = 0; i < pids_.size(); ++i) {
      if (pids_[i] > 0) ::kill(pids_[i], SIGKILL);
      if (pids_[i] > 0) wait(i);
    }
    ::munmap(board_, sizeof(Board));
  }

  Board& board() { return *board_; }
  void signal(std::size_t rank, int number) { ::kill(pids_[rank], number); }

  // Waits for a rank to end. Returns the wait status.
  int wait(std::size_t rank) {
    int status = 0;
    while (::waitpid(pids_[rank], &status, 0) < 0 && errno == EINTR) {
    }
    pids_[rank] = 0;
    return status;
  }

  // Waits for a rank that should end by itself. Returns the text of what it threw, or an empty one.
  std::string error_of(std::size_t rank) {
    const int status = wait(rank);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
      throw std::runtime_error("rank " + std::to_string(rank) + " ended with wait status " +
                               std::to_string(status));
    return board_->errors[rank].data();
  }

  std::vector<std::string> errors() {
    std::vector<std::string> all;
    for (std::size_t i = 0; i < pids_.size(); ++i) all.push_back(error_of(i));
    return all;
  }

 private:
  void run(std::size_t me,
           std::size_t ranks,
           const std::function<void(Rank&, Board&)>& body) noexcept {
    try {
      board_->heaps[me] = shm::Heap::mine().address();
      shm::Segment made;
      if (me == 0) {
        made = make_control(ranks);
        board_->control = made.address();
      }
      meet(ranks);
      std::vector<shm::Member> members;
      std::vector<std::shared_ptr<const shm::Segment>> heaps;
      for (std::size_t i = 0; i < ranks; ++i) {
        const auto process = shm::process_of(board_->heaps[i]);
        heaps.push_back(shm::open_peer_heap(board_->heaps[i]));
        members.push_back(
            {static_cast<int>(i), heaps.back()->data(), heaps.back()->size(), process});
      }
      const shm::Segment control = shm::Segment::open(board_->control);
      meet(2 * ranks);
      made = shm::Segment();
      shm::Group group(shm::Layout(control.data(), ranks), members, me);
      shm::Collectives collectives(group);
      Rank rank{me, ranks, group, collectives};
      body(rank, *board_);
      group.leave();
    } catch (const std::exception& error) {
      std::snprintf(board_->errors[me].data(), board_->errors[me].size(), "%s", error.what());
    }
  }

  void meet(std::size_t count) {
    board_->ready.fetch_add(1);
    wait_until([&] { return board_->ready.load() >= count; });
  }

  Board* board_;
  std::vector<pid_t> pids_;
};

}  // namespace ranks
