#include "shm/process.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <vector>

#include "shm/error.h"

namespace fastddp::shm {
namespace {

// pidfd_info of <linux/pidfd.h> (Linux 6.15), which most systems' headers lack today.
struct PidfdInfo {
  std::uint64_t mask;
  std::uint64_t cgroup_id;
  std::uint32_t ids[11];
  std::int32_t exit_code;
};
constexpr std::uint64_t kInfoExit = 1u << 3;

std::string describe_end(int status) {
  if (WIFSIGNALED(status)) {
    const int signal = WTERMSIG(status);
    std::string name = ::strsignal(signal);
    if (signal == 9) name += ", as the system does when memory runs out";
    return "was killed by signal " + std::to_string(signal) + " (" + name + ")";
  }
  return "exited with status " + std::to_string(WEXITSTATUS(status));
}

// Returns the wait status of a process that its parent has waited for.
std::optional<int> end_once_collected(int pidfd) {
  PidfdInfo info{};
  info.mask = kInfoExit;
  if (::ioctl(pidfd, _IOWR(0xFF, 11, PidfdInfo), &info) == 0 && (info.mask & kInfoExit) != 0)
    return info.exit_code;
  return std::nullopt;
}

// Returns the wait status of a process that ended, whether or not its parent has waited for it.
std::optional<int> end_of(pid_t pid, int pidfd) {
  if (const auto status = end_once_collected(pidfd)) return status;
  // Fields after the parenthesised name: the state is the first, the exit code the last (proc(5)).
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  const auto after_name = text.rfind(')');
  if (after_name == std::string::npos) return end_once_collected(pidfd);  // now waited for
  std::istringstream rest(text.substr(after_name + 1));
  const std::vector<std::string> fields{std::istream_iterator<std::string>(rest), {}};
  if (fields.size() < 50 || (fields.front() != "Z" && fields.front() != "X")) return std::nullopt;
  return std::stoi(fields[49]);
}

bool is_stopped(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  const auto after_name = text.rfind(')');
  return after_name != std::string::npos && after_name + 2 < text.size() &&
         (text[after_name + 2] == 'T' || text[after_name + 2] == 't');
}

}  // namespace

Process::Process(pid_t pid)
    : pid_(pid), pidfd_(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))) {
  if (pidfd_.get() < 0)
    throw Error("pidfd_open of process " + std::to_string(pid) + ": " + std::strerror(errno));
}

bool Process::ended() const {
  pollfd entry{pidfd_.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) == 1;
}

bool Process::was_killed() const {
  const auto status = ended() ? end_of(pid_, pidfd_.get()) : std::nullopt;
  return status && WIFSIGNALED(*status);
}

std::string Process::describe() const {
  const std::string who = "(process " + std::to_string(pid_) + ") ";
  if (!ended()) return who + (is_stopped(pid_) ? "is stopped" : "is running");
  const auto status = end_of(pid_, pidfd_.get());
  return who + (status ? describe_end(*status) : "has ended");
}

std::shared_ptr<const Process> process_of(const Address& heap) {
  struct Entry {
    Nonce nonce;  // pids are reused, the nonce of a heap is not
    std::weak_ptr<const Process> process;
  };
  static std::mutex mutex;
  static auto& opened = *new std::map<pid_t, Entry>;
  const std::lock_guard lock(mutex);
  std::erase_if(opened, [](const auto& each) { return each.second.process.expired(); });
  const auto entry = opened.find(heap.pid);
  if (entry != opened.end() && entry->second.nonce == heap.nonce) {
    if (auto process = entry->second.process.lock()) return process;
  }
  auto process = std::make_shared<const Process>(heap.pid);
  opened[heap.pid] = {heap.nonce, process};
  return process;
}

}  // namespace fastddp::shm
