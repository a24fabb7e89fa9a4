#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "shm/error.h"
#include "shm/heap.h"
#include "shm_ranks.h"

using fastddp::shm::Error;
using fastddp::shm::Heap;
using fastddp::shm::open_peer_heap;
using fastddp::shm::Segment;

namespace {

std::size_t page() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

char* allocate(std::size_t bytes) { return static_cast<char*>(Heap::mine().allocate(bytes)); }

bool is_zero(const char* block, std::size_t bytes) {
  return std::all_of(block, block + bytes, [](char byte) { return byte == 0; });
}

std::size_t resident_bytes() {
  struct stat status = {};
  CHECK(::fstat(Heap::mine().address().fd, &status) == 0);
  return static_cast<std::size_t>(status.st_blocks) * 512;
}

// Runs `body` in a child process with its own heap. Returns whether it threw nothing.
template <typename Body>
bool holds_in_child(const Body& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    try {
      body();
      ::_exit(0);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "in the child: %s\n", error.what());
    }
    ::_exit(1);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  return status == 0;
}

}  // namespace

TEST(blocks_are_aligned_zeroed_and_apart) {
  std::mt19937 random(3);
  std::map<char*, std::size_t> blocks;
  for (int i = 0; i < 300; ++i) {
    if (!blocks.empty() && random() % 2 == 0) {
      auto victim = blocks.begin();
      std::advance(victim, static_cast<std::ptrdiff_t>(random() % blocks.size()));
      CHECK(std::all_of(victim->first, victim->first + victim->second,
                        [&](char byte) { return byte == static_cast<char>(victim->second); }));
      Heap::mine().free(victim->first);
      blocks.erase(victim);
    } else {
      const std::size_t bytes = 1 + random() % (5 * page());
      char* block = allocate(bytes);
      CHECK(reinterpret_cast<std::uintptr_t>(block) % page() == 0);
      CHECK(Heap::mine().contains(block, bytes));
      CHECK(is_zero(block, bytes));
      std::memset(block, static_cast<char>(bytes), bytes);
      const auto after = blocks.upper_bound(block);
      CHECK(after == blocks.end() || block + bytes <= after->first);
      blocks[block] = bytes;
    }
  }
  for (const auto& [block, bytes] : blocks) Heap::mine().free(block);
  CHECK(Heap::mine().used() == 0);
}

TEST(pages_that_are_kept_come_back_zeroed_and_go_in_the_end) {
  Heap& heap = Heap::mine();
  const std::size_t before = resident_bytes();
  std::vector<char*> blocks;
  for (const std::size_t pages : {3, 1, 4, 1, 5}) {
    blocks.push_back(allocate(pages * page()));
    std::memset(blocks.back(), 7, pages * page());
  }
  const std::size_t filled = resident_bytes();
  CHECK(filled >= before + 14 * page());
  {
    const Heap::KeepsPages keeps(heap);
    std::vector<char*> others;
    for (char* block : blocks) heap.free(block);
    CHECK(resident_bytes() == filled);
    for (const std::size_t pages : {2, 6, 4}) {  // that cut through those before
      others.push_back(allocate(pages * page()));
      CHECK(is_zero(others.back(), pages * page()));
      std::memset(others.back(), 9, pages * page());
    }
    CHECK(resident_bytes() == filled);
    heap.free(others[1]);
    char* again = allocate(5 * page());
    CHECK(is_zero(again, 5 * page()));
    for (char* block : {others[0], again, others[2]}) heap.free(block);
    CHECK(heap.used() == 0);
  }
  CHECK(resident_bytes() <= before);
}

TEST(freed_neighbours_become_one_hole_in_whatever_order) {
  std::vector<std::size_t> order{0, 1, 2, 3};
  do {
    std::vector<char*> blocks;
    for (int i = 0; i < 4; ++i) blocks.push_back(allocate(page()));
    char* const end = allocate(page());
    for (const std::size_t i : order) Heap::mine().free(blocks[i]);
    char* const whole = allocate(4 * page());
    CHECK(whole == *std::min_element(blocks.begin(), blocks.end()));
    Heap::mine().free(whole);
    Heap::mine().free(end);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(memory_goes_back_to_the_system_when_freed) {
  constexpr std::size_t kBytes = 8 << 20;
  const std::size_t before = resident_bytes();
  char* block = allocate(kBytes);
  std::memset(block, 1, kBytes);
  CHECK(resident_bytes() >= before + kBytes);
  Heap::mine().free(block);
  CHECK(resident_bytes() == before);
}

TEST(a_request_that_does_not_fit_names_its_size) {
  for (const std::size_t bytes : {std::size_t{1} << 60, SIZE_MAX - 1, SIZE_MAX}) {
    try {
      Heap::mine().allocate(bytes);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(ranks::has(error.what(), std::to_string(bytes)));
    }
  }
  CHECK(Heap::mine().used() == 0);
}

TEST(an_empty_block_is_a_block) {
  char* first = allocate(0);
  char* second = allocate(0);
  CHECK(first != second && first != nullptr);
  Heap::mine().free(first);
  Heap::mine().free(second);
  Heap::mine().free(second);  // no longer a block, so this has no effect
  CHECK(Heap::mine().used() == 0);
}

TEST(contains_goes_by_all_of_the_bytes) {
  const Heap& heap = Heap::mine();
  const std::size_t size = heap.address().bytes;
  int elsewhere = 0;
  CHECK(heap.contains(heap.data(), size));
  CHECK(!heap.contains(heap.data() + 1, size));
  CHECK(!heap.contains(&elsewhere, sizeof(elsewhere)));
  CHECK(!heap.contains(nullptr, 0));
}

TEST(a_forked_process_has_a_heap_of_its_own_and_leaves_its_parents_alone) {
  char* const block = allocate(100);
  block[0] = 5;
  Heap& heap = Heap::mine();
  CHECK(holds_in_child([&] {
    CHECK(&Heap::mine() != &heap);
    CHECK(Heap::mine().used() == 0);
    CHECK(!(Heap::mine().address().nonce == heap.address().nonce));
    heap.free(block);
    char* own = allocate(100);
    own[0] = 6;
    CHECK(block[0] == 5);
    Heap::mine().free(own);
  }));
  CHECK(&Heap::mine() == &heap);
  CHECK(block[0] == 5 && heap.used() == page());
  heap.free(block);
}

TEST(retired_blocks_give_memory_back_but_are_not_used_again) {
  CHECK(holds_in_child([] {
    char* const before = allocate(page());
    Heap::mine().free(before);
    char* const block = allocate(page());
    CHECK(block == before);
    char* const other = allocate(page());
    Heap::mine().retire(static_cast<std::uint64_t>(block - Heap::mine().data()) + 7);
    Heap::mine().retire(Heap::mine().size() - 1);  // in no block
    // Only that block is retired: others are used again.
    Heap::mine().free(other);
    CHECK(allocate(page()) == other);
    Heap::mine().free(other);
    block[0] = 1;
    const std::size_t resident = resident_bytes();
    Heap::mine().free(block);
    CHECK(resident_bytes() == resident - page());
    char* const next = allocate(page());
    CHECK(next != block);
    CHECK(Heap::mine().used() == page());
  }));
}

TEST(a_peers_heap_is_mapped_once_while_it_is_used) {
  const auto files = ranks::count_open_files();
  auto first = open_peer_heap(Heap::mine().address());
  CHECK(open_peer_heap(Heap::mine().address()) == first);
  char* const block = allocate(10);
  block[3] = 9;
  CHECK(first->data()[block - Heap::mine().data() + 3] == 9);
  Heap::mine().free(block);
  const std::weak_ptr<const Segment> watch = first;
  first.reset();
  CHECK(watch.expired());
  CHECK(open_peer_heap(Heap::mine().address()) != nullptr);
  CHECK(ranks::count_open_files() == files);
}

TEST(threads_allocate_and_free_at_once) {
  std::vector<std::thread> threads;
  std::atomic<int> bad{0};
  for (int k = 0; k < 4; ++k) {
    threads.emplace_back([&bad, k] {
      std::mt19937 random(static_cast<unsigned>(k));
      for (int i = 0; i < 200; ++i) {
        const std::size_t bytes = 1 + random() % (3 * page());
        char* const block = allocate(bytes);
        if (!is_zero(block, bytes)) bad.fetch_add(1);
        std::memset(block, k + 1, bytes);
        if (block[bytes - 1] != k + 1) bad.fetch_add(1);
        Heap::mine().free(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(bad == 0);
  CHECK(Heap::mine().used() == 0);
}

int main() { return check::run(); }
