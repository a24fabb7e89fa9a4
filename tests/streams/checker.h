// What a device would be allowed to reorder: happens-before between streams, kept in vector clocks
// (Fidge, "Timestamps in message-passing systems that preserve the partial ordering", 1988), and
// the accesses to each block of memory.
//
// Everything runs at once and in program order on the host, so values are always right. What is
// checked is whether they had to be: whether an access happens after those it conflicts with by the
// order of a stream, by an event, or because the host has waited.
//
// Rules:
// * Two accesses to one byte, one of them a write, must be ordered. Else: "race".
// * A byte must have been written before it is read. Else: "uninitialised read".
// * Freed memory goes back to the stream that it was allocated on, to be reused at once in that
//   stream's order. That stream must therefore be ordered after every use, except those on streams
//   told by record_stream, which the allocator waits for. Else: "premature free".
//
// Limits: what the host has waited for is known to all its threads. A strided range
// counts as all the bytes from its first to its last.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace standin {

using Time = std::uint64_t;

// By stream, how many of its operations are known to have ended.
class Clock {
 public:
  Time at(std::size_t stream) const { return stream < times_.size() ? times_[stream] : 0; }
  Time tick(std::size_t stream) {
    grow(stream + 1);
    return ++times_[stream];
  }
  void join(const Clock& other) {
    grow(other.times_.size());
    for (std::size_t i = 0; i < other.times_.size(); ++i)
      times_[i] = std::max(times_[i], other.times_[i]);
  }
  // Whether whoever has this clock knows all that `other` knows.
  bool covers(const Clock& other) const {
    for (std::size_t i = 0; i < other.times_.size(); ++i)
      if (other.times_[i] > at(i)) return false;
    return true;
  }

 private:
  void grow(std::size_t size) {
    if (times_.size() < size) times_.resize(size, 0);
  }
  std::vector<Time> times_;
};

// Of bytes, half open.
struct Range {
  std::size_t begin = 0;
  std::size_t end = 0;
  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
  bool covers(const Range& other) const { return begin <= other.begin && other.end <= end; }
};

// One operation on one stream.
struct Launch {
  std::size_t stream = 0;
  Time time = 0;
  std::string op;
};

struct Access {
  Range range;
  Launch launch;
  bool is_write = false;
};

// What is known of one allocation.
struct Shadow {
  std::size_t number = 0;
  std::size_t num_bytes = 0;
  std::size_t stream = 0;          // that it was allocated on
  std::vector<Access> accesses;    // those that a later one may conflict with
  std::vector<Range> written;      // disjoint, ascending
  std::set<std::size_t> told;      // streams given to record_stream
  bool has_uninitialised = false;  // was reported: once per allocation is enough
};

struct Finding {
  std::string kind;
  std::string text;
};

struct HostSync {
  std::string what;
  std::string where;
  bool in_backward = false;
};

class Checker {
 public:
  // ---- streams and events --------------------------------------------------------------

  std::size_t new_stream() {
    const std::lock_guard lock(mutex_);
    clocks_.push_back(host_);
    return clocks_.size() - 1;
  }
  void name_stream(std::size_t stream, std::string name) {
    const std::lock_guard lock(mutex_);
    names_[stream] = std::move(name);
  }
  Clock record(std::size_t stream) {
    const std::lock_guard lock(mutex_);
    return clock(stream);
  }
  void block(const Clock& event, std::size_t stream) {
    const std::lock_guard lock(mutex_);
    clock(stream).join(event);
  }
  bool host_knows(const Clock& event) {
    const std::lock_guard lock(mutex_);
    return host_.covers(event);
  }
  void host_waits(const Clock& event) {
    const std::lock_guard lock(mutex_);
    host_.join(event);
  }
  void host_waits_for_all() {
    const std::lock_guard lock(mutex_);
    for (const Clock& one : clocks_) host_.join(one);
  }

  // ---- memory ----------------------------------------------------------------------------

  Shadow allocate(std::size_t num_bytes, std::size_t stream) {
    const std::lock_guard lock(mutex_);
    Shadow shadow;
    shadow.number = ++num_allocations_;
    shadow.num_bytes = num_bytes;
    shadow.stream = stream;
    return shadow;
  }

  void tell(Shadow& shadow, std::size_t stream) {
    const std::lock_guard lock(mutex_);
    shadow.told.insert(stream);
  }

  void free(const Shadow& shadow) {
    const std::lock_guard lock(mutex_);
    // The allocator waits for an event that it records now on each stream it was told of.
    Clock reused = clock(shadow.stream);
    for (const std::size_t stream : shadow.told) reused.join(clock(stream));
    for (const Access& access : shadow.accesses) {
      const Launch& use = access.launch;
      if (reused.at(use.stream) >= use.time) continue;
      add("premature free", describe(shadow) + " was freed while " + describe(access) +
                                " may still run: " + name(shadow.stream) +
                                ", which reuses the memory, is not ordered after it");
      return;
    }
  }

  // ---- operations --------------------------------------------------------------------------

  Launch launch(std::size_t stream, std::string op) {
    const std::lock_guard lock(mutex_);
    return {stream, clock(stream).tick(stream), std::move(op)};
  }

  void read(Shadow& shadow, const Range& range, const Launch& launch) {
    const std::lock_guard lock(mutex_);
    if (!shadow.has_uninitialised && !is_written(shadow, range)) {
      shadow.has_uninitialised = true;
      add("uninitialised read", describe(Access{range, launch, false}) + " of " + describe(shadow) +
                                    ", not all of which was ever written");
    }
    add_access(shadow, {range, launch, false});
  }

  void write(Shadow& shadow, const Range& range, const Launch& launch) {
    const std::lock_guard lock(mutex_);
    add_access(shadow, {range, launch, true});
    Range joined = range;
    std::vector<Range> kept;
    for (const Range& old : shadow.written) {
      if (old.end < joined.begin || joined.end < old.begin) {
        kept.push_back(old);
      } else {
        joined = {std::min(old.begin, joined.begin), std::max(old.end, joined.end)};
      }
    }
    kept.push_back(joined);
    std::sort(kept.begin(), kept.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    shadow.written = std::move(kept);
  }

  // ---- reports -----------------------------------------------------------------------------

  void add_sync(HostSync sync) {
    const std::lock_guard lock(mutex_);
    syncs_.push_back(std::move(sync));
  }
  std::vector<Finding> take_findings() {
    const std::lock_guard lock(mutex_);
    return std::exchange(findings_, {});
  }
  std::vector<HostSync> take_syncs() {
    const std::lock_guard lock(mutex_);
    return std::exchange(syncs_, {});
  }

 private:
  // Of a stream, with what the host knows: whatever is launched now comes after it.
  Clock& clock(std::size_t stream) {
    clocks_.at(stream).join(host_);
    return clocks_[stream];
  }

  static bool is_written(const Shadow& shadow, const Range& range) {
    return std::any_of(shadow.written.begin(), shadow.written.end(),
                       [&](const Range& written) { return written.covers(range); });
  }

  void add_access(Shadow& shadow, Access access) {
    const Clock& now = clocks_[access.launch.stream];
    for (const Access& old : shadow.accesses) {
      if (!(old.is_write || access.is_write) || !old.range.overlaps(access.range)) continue;
      if (now.at(old.launch.stream) >= old.launch.time) continue;
      // An operator that works in place reads and writes: one race, not two.
      const bool is_known = last_race_ == std::pair(access.launch.stream, access.launch.time);
      last_race_ = {access.launch.stream, access.launch.time};
      if (!is_known)
        add("race", describe(access) + " of " + describe(shadow) + " is not ordered after " +
                        describe(old));
      break;
    }
    // What this one hides: a later access that is ordered after this one is so after those too, or
    // that has been reported.
    const auto is_hidden = [&](const Access& old) {
      return access.range.covers(old.range) &&
             (access.is_write || (!old.is_write && old.launch.stream == access.launch.stream));
    };
    auto& all = shadow.accesses;
    all.erase(std::remove_if(all.begin(), all.end(), is_hidden), all.end());
    all.push_back(std::move(access));
  }

  void add(std::string kind, std::string text) {
    findings_.push_back({std::move(kind), std::move(text)});
  }

  std::string name(std::size_t stream) const {
    const auto found = names_.find(stream);
    return found == names_.end() ? "stream " + std::to_string(stream) : found->second;
  }
  std::string describe(const Access& access) const {
    return std::string("the ") + (access.is_write ? "write" : "read") + " by " + access.launch.op +
           " on " + name(access.launch.stream);
  }
  std::string describe(const Shadow& shadow) const {
    return "allocation " + std::to_string(shadow.number) + " (" + std::to_string(shadow.num_bytes) +
           " bytes, of " + name(shadow.stream) + ")";
  }

  std::mutex mutex_;
  std::vector<Clock> clocks_ =
      std::vector<Clock>(2);  // by stream; 0 and 1 are the devices' default ones
  std::map<std::size_t, std::string> names_{{0, "the default stream"},
                                            {1, "the second device's default stream"}};
  Clock host_;
  std::size_t num_allocations_ = 0;
  std::pair<std::size_t, Time> last_race_{0, 0};  // stream and time of the launch
  std::vector<Finding> findings_;
  std::vector<HostSync> syncs_;
};

}  // namespace standin
