#include "core/block_cache.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"

using fastddp::BlockCache;

namespace {

// What the caches below hold of the system's memory, by block.
std::unordered_map<void*, std::size_t> held;
std::size_t held_bytes = 0;
std::size_t system_bytes = SIZE_MAX;

void* take(std::size_t bytes) {
  if (held_bytes + bytes > system_bytes) throw std::bad_alloc();
  void* const block = std::malloc(1);  // sizes are only counted
  held.emplace(block, bytes);
  held_bytes += bytes;
  return block;
}

void give(void* block) {
  held_bytes -= held.at(block);
  held.erase(block);
  std::free(block);
}

}  // namespace

TEST(a_freed_block_serves_the_next_request_of_about_its_size) {
  BlockCache cache(&take, &give);
  void* const other = cache.allocate(20000);  // so that there is room for idle blocks
  void* const block = cache.allocate(1000);
  CHECK(cache.release(block));
  CHECK(cache.idle() == 1000 && cache.in_use() == 20000);
  void* const larger = cache.allocate(1001);
  CHECK(larger != block);
  void* const much_smaller = cache.allocate(800);
  CHECK(much_smaller != block);
  CHECK(cache.allocate(900) == block);
  CHECK(cache.idle() == 0 && cache.in_use() == 20000 + 1000 + 1001 + 800);
  for (void* const each : {other, block, larger, much_smaller}) CHECK(cache.release(each));
  cache.trim();
  CHECK(cache.idle() == 0 && held_bytes == 0);
}

TEST(the_best_fit_is_taken_and_among_equals_the_last_freed) {
  BlockCache cache(&take, &give);
  void* const large = cache.allocate(1090);
  void* const first = cache.allocate(1010);
  void* const second = cache.allocate(1010);
  for (void* const each : {first, second, large}) CHECK(cache.release(each));
  CHECK(cache.allocate(1000) == second);
  CHECK(cache.allocate(1000) == first);
  CHECK(cache.allocate(1000) == large);
  for (void* const each : {first, second, large}) CHECK(cache.release(each));
  cache.trim();
}

TEST(a_block_of_another_origin_is_refused) {
  BlockCache cache(&take, &give);
  int other = 0;
  CHECK(!cache.release(&other));
  void* const block = cache.allocate(1);
  CHECK(cache.release(block));
  CHECK(!cache.release(block));
  cache.trim();
}

TEST(a_step_that_repeats_asks_the_system_for_nothing) {
  BlockCache cache(&take, &give);
  const auto step = [&cache] {  // a small block is in use while the large ones are idle
    void* const small = cache.allocate(4);
    CHECK(cache.release(small));
    void* const one = cache.allocate(500);
    void* const other = cache.allocate(500);
    CHECK(cache.release(one) && cache.release(other));
  };
  step();
  const auto after_one = held;
  for (int i = 0; i < 100; ++i) step();
  CHECK(held == after_one);
  cache.trim();
}

TEST(what_is_held_stays_within_a_quarter_of_the_peak_whatever_is_asked_for) {
  BlockCache cache(&take, &give);
  std::mt19937 random(3);
  std::vector<void*> in_use;
  for (int i = 0; i < 20000; ++i) {
    if (in_use.size() < 8 && random() % 2 == 0) {
      in_use.push_back(cache.allocate(1 + random() % 10000));
    } else if (!in_use.empty()) {
      std::swap(in_use[random() % in_use.size()], in_use.back());
      CHECK(cache.release(in_use.back()));
      in_use.pop_back();
    }
    CHECK(held_bytes == cache.in_use() + cache.idle());
    CHECK(held_bytes <= cache.limit());
    CHECK(cache.peak() <= 8 * 11250);
  }
  for (void* const block : in_use) CHECK(cache.release(block));
  cache.trim();
  CHECK(held.empty());
}

TEST(a_peak_that_does_not_come_again_is_given_back) {
  BlockCache cache(&take, &give);
  void* const once = cache.allocate(1000);
  CHECK(cache.release(once));
  for (int i = 0; i < 162; ++i) CHECK(cache.release(cache.allocate(100)));
  CHECK(held_bytes == 100);
  cache.trim();
}

TEST(idle_blocks_are_given_up_where_memory_is_short) {
  BlockCache cache(&take, &give);
  void* const block = cache.allocate(1000);
  CHECK(cache.release(block));
  system_bytes = 1200;
  void* const other = cache.allocate(250);  // fits only without the idle block
  CHECK(held_bytes == 250);
  CHECK_THROWS(cache.allocate(2000), std::bad_alloc);
  CHECK(cache.in_use() == 250 && cache.peak() == 1000);
  system_bytes = SIZE_MAX;
  CHECK(cache.release(other));
  cache.trim();
}

int main() { return check::run(); }
