#include "core/block_cache.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"

using fastddp::BlockCache;

namespace {

// The blocks that the caches below hold of the system's memory, with their sizes.
std::unordered_map<void*, std::size_t> held;
std::size_t held_bytes = 0;
std::size_t num_taken = 0;  // in total
std::size_t system_bytes = SIZE_MAX;

void* take(std::size_t bytes) {
  if (held_bytes + bytes > system_bytes) throw std::bad_alloc();
  void* const block = std::malloc(1);  // sizes are only counted
  held.emplace(block, bytes);
  held_bytes += bytes;
  ++num_taken;
  return block;
}

void give(void* block, std::size_t bytes) {
  CHECK(held.at(block) == bytes);
  held_bytes -= bytes;
  held.erase(block);
  std::free(block);
}

constexpr auto kPatience = std::chrono::seconds(30);

// A cache with a clock that a test moves.
struct TimedCache : BlockCache {
  TimedCache() : BlockCache(&take, &give, kPatience) {}
  void* allocate(std::size_t bytes) { return BlockCache::allocate(bytes, now); }
  bool release(void* block) { return BlockCache::release(block, now); }
  void decay_after(Clock::duration time) { decay(now += time); }

  Clock::time_point now{std::chrono::hours(1)};
};

}  // namespace

TEST(a_freed_block_serves_the_next_request_of_about_its_size) {
  TimedCache cache;
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
  TimedCache cache;
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
  TimedCache cache;
  int other = 0;
  CHECK(!cache.release(&other));
  void* const block = cache.allocate(1);
  CHECK(cache.release(block));
  CHECK(!cache.release(block));
  cache.trim();
}

TEST(a_step_that_repeats_asks_the_system_for_nothing) {
  TimedCache cache;
  const auto step = [&cache] {  // a small block is in use while the large ones are idle
    void* const small = cache.allocate(4);
    CHECK(cache.release(small));
    void* const one = cache.allocate(500);
    void* const other = cache.allocate(500);
    CHECK(cache.release(one) && cache.release(other));
  };
  step();
  const std::size_t after_one = num_taken;
  for (int i = 0; i < 100; ++i) step();
  CHECK(num_taken == after_one);
  cache.trim();
}

TEST(what_is_held_stays_within_a_quarter_of_the_peak_whatever_is_asked_for) {
  TimedCache cache;
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

TEST(a_block_that_is_not_asked_for_is_given_back_in_time) {
  TimedCache cache;
  void* const once = cache.allocate(100);
  void* const again = cache.allocate(1000);
  CHECK(cache.release(once) && cache.release(again));
  for (int seconds = 0; seconds < 29; ++seconds) {
    cache.decay_after(std::chrono::seconds(1));
    CHECK(cache.allocate(1000) == again && cache.release(again));
    CHECK(held_bytes == 1100);
  }
  cache.decay_after(std::chrono::seconds(1));
  CHECK(held_bytes == 1000);
  cache.decay_after(kPatience);  // without any request
  CHECK(held_bytes == 0 && cache.idle() == 0);
}

TEST(a_peak_that_does_not_come_again_leaves_no_room_for_idle_blocks) {
  TimedCache cache;
  CHECK(cache.release(cache.allocate(6000)));  // a checkpoint
  std::size_t size = 100;
  const auto step = [&] {  // with sizes that never fit an idle block
    size = size < 200 ? size * 6 / 5 : 100;
    CHECK(cache.release(cache.allocate(size)));
    cache.decay_after(kPatience / 10);
  };
  for (int i = 0; i < 9; ++i) step();
  CHECK(cache.peak() == 6000 && held_bytes > 6000);
  for (int i = 0; i < 20; ++i) step();
  CHECK(cache.peak() <= 240);
  for (int i = 0; i < 100; ++i) {
    step();
    CHECK(held_bytes == cache.idle() && cache.idle() <= 240 + 240 / 4);
  }
  cache.trim();
}

TEST(what_is_in_use_for_long_counts_as_recent) {
  TimedCache cache;
  void* const large = cache.allocate(1000);
  cache.decay_after(10 * kPatience);
  CHECK(cache.peak() == 1000);
  CHECK(cache.release(large));
  CHECK(cache.idle() == 1000);
  cache.decay_after(kPatience / 2);
  CHECK(cache.allocate(1000) == large);
  CHECK(cache.release(large));
  cache.trim();
}

TEST(steps_find_their_blocks_however_often_others_come_between) {
  TimedCache cache;
  const auto pass = [&cache](std::vector<std::size_t> sizes) {
    std::vector<void*> blocks;
    for (const std::size_t size : sizes) blocks.push_back(cache.allocate(size));
    for (void* const block : blocks) CHECK(cache.release(block));
    cache.decay_after(std::chrono::milliseconds(50));
  };
  const auto all = [&pass] {  // three steps, or micro-batches, and an evaluation
    for (int i = 0; i < 3; ++i) pass({400, 500, 600});
    pass({300, 50});
  };
  all();
  const std::size_t after_one = num_taken;
  for (int i = 0; i < 1000; ++i) all();  // for longer than the patience
  CHECK(num_taken == after_one);
  cache.trim();
}

// A plain version of the rule: the smallest block that fits and, among equals, the one freed last.
TEST(it_takes_what_a_search_of_all_blocks_finds) {
  TimedCache cache;
  struct Idle {
    void* data;
    std::size_t bytes;
  };
  std::vector<Idle> idle, in_use;
  const auto find = [&idle](std::size_t bytes) {
    auto best = idle.end();
    for (auto block = idle.begin(); block != idle.end(); ++block) {
      if (block->bytes < bytes || block->bytes - bytes > bytes / 8) continue;
      if (best == idle.end() || block->bytes <= best->bytes) best = block;
    }
    return best;
  };
  std::mt19937 random(5);
  void* const room = cache.allocate(1000000);  // so that no block is evicted
  for (int i = 0; i < 20000; ++i) {
    if (in_use.empty() || random() % 2 == 0) {
      const std::size_t bytes = 100 + random() % 50;
      const auto expected = find(bytes);
      void* const data = cache.allocate(bytes);
      if (expected == idle.end()) {
        in_use.push_back({data, bytes});
      } else {
        CHECK(data == expected->data);
        in_use.push_back(*expected);
        idle.erase(expected);
      }
    } else {
      std::swap(in_use[random() % in_use.size()], in_use.back());
      CHECK(cache.release(in_use.back().data));
      idle.push_back(in_use.back());
      in_use.pop_back();
    }
  }
  for (const Idle& block : in_use) CHECK(cache.release(block.data));
  CHECK(cache.release(room));
  const std::size_t bytes = held_bytes;
  CHECK(cache.trim() == bytes && held_bytes == 0);
}

TEST(idle_blocks_are_given_up_where_memory_is_short) {
  TimedCache cache;
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

TEST(threads_share_it_under_one_lock) {
  TimedCache cache;
  std::mutex mutex;
  std::atomic<bool> is_right = true;
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 2000; ++i) {
        void* block = nullptr;
        {
          const std::lock_guard lock(mutex);
          block = cache.allocate(1 + random() % 100);
          if (random() % 100 == 0) cache.trim();
          if (random() % 100 == 0) cache.decay_after(kPatience);
        }
        const std::lock_guard lock(mutex);
        if (!cache.release(block)) is_right = false;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(is_right && cache.in_use() == 0 && held_bytes == cache.idle());
  cache.trim();
}

int main() { return check::run(); }
