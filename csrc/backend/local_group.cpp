#include "backend/local_group.h"

#include <algorithm>
#include <utility>

#include "core/board.h"
#include "shm/error.h"
#include "shm/heap.h"
#include "shm/process.h"

namespace fastddp {
namespace {

// A group and what lies behind it.
struct Memory {
  shm::Segment control;
  std::vector<std::shared_ptr<const shm::Segment>> heaps;
  std::unique_ptr<shm::Group> group;
};

}  // namespace

shm::Segment LocalGroup::make_control(std::size_t ranks) {
  auto segment = shm::Segment::create("fastddp-group", shm::Layout::bytes(ranks));
  shm::Layout(segment.data(), ranks).construct();
  return segment;
}

LocalGroup LocalGroup::open(int rank, const LocalRanks& local) {
  const std::size_t count = local.ranks.size();
  const auto memory = std::make_shared<Memory>();
  std::vector<shm::Member> members;
  for (std::size_t i = 0; i < count; ++i) {
    const shm::Address& address = local.heaps.at(i);
    // First, so that the heap proves it to be the right process.
    const auto process = shm::process_of(address);
    char* heap = shm::Heap::mine().data();
    if (!(address == shm::Heap::mine().address())) {
      memory->heaps.push_back(shm::open_peer_heap(address));
      heap = memory->heaps.back()->data();
    }
    members.push_back({local.ranks[i], heap, address.bytes, process});
  }
  memory->control = shm::Segment::open(local.control);
  const shm::Layout layout(memory->control.data(), count);
  if (memory->control.size() != shm::Layout::bytes(count) ||
      layout.header().version != shm::kLayoutVersion || layout.header().ranks != count) {
    throw shm::Error("the ranks use different versions of fastddp");
  }
  const auto me = std::find(local.ranks.begin(), local.ranks.end(), rank) - local.ranks.begin();
  memory->group = std::make_unique<shm::Group>(
      layout, std::move(members), static_cast<std::size_t>(me), board::id_of(local.name));
  return {{memory, memory->group.get()}, layout};
}

}  // namespace fastddp
