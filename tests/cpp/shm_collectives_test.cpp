// The results of the collectives. Ranks are threads.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "shm_operands.h"
#include "shm_ranks.h"

using fastddp::Element;
using fastddp::Reduction;
using operands::Case;
using operands::kCases;
using ranks::check_none;
using ranks::Rank;
using ranks::run_threads;
using ranks::soon;

namespace {

constexpr std::size_t kRanks[] = {1, 2, 3, 4, 5, 8};

// Lengths around the size that travels with the first step, and around one and many slots.
std::vector<std::size_t> numels_of(std::size_t element_bytes, std::size_t slot_bytes) {
  const std::size_t few = (std::size_t{8} << 10) / element_bytes;
  const std::size_t slot = slot_bytes / element_bytes;
  return {0, 1, 2, 3, 17, few - 1, few, few + 1, slot - 1, slot, slot + 1, 2 * slot, 6 * slot + 3};
}

enum class Where { kElsewhere, kInHeaps, kMixed };

bool in_heap(Where where, std::size_t me) {
  return where == Where::kInHeaps || (where == Where::kMixed && me % 2 == 0);
}

// Runs `body(rank, numel, in_heap, seed)` for all numbers of ranks, lengths and places.
template <typename Body>
void for_all(std::size_t element_bytes, const Body& body) {
  for (const std::size_t ranks : kRanks) {
    check_none(run_threads(ranks, [&](Rank& rank) {
      std::size_t seed = 0;
      for (const std::size_t numel : numels_of(element_bytes, fastddp::shm::kSlotBytes)) {
        for (const Where where : {Where::kElsewhere, Where::kInHeaps, Where::kMixed})
          body(rank, numel, in_heap(where, rank.me), seed++);
      }
    }));
  }
}

}  // namespace

TEST(all_reduce_of_all_lengths_in_all_places) {
  for_all(4, [](Rank& rank, std::size_t numel, bool heap, std::size_t seed) {
    operands::all_reduce(rank, {Element::kFloat32, Reduction::kSum}, numel, heap, seed);
  });
}

TEST(broadcast_of_all_lengths_in_all_places) {
  for_all(4, [](Rank& rank, std::size_t numel, bool heap, std::size_t seed) {
    operands::broadcast(rank, Element::kFloat32, numel, heap, seed, seed % rank.ranks);
  });
}

TEST(all_gather_of_all_lengths_in_all_places) {
  for_all(4, [](Rank& rank, std::size_t numel, bool heap, std::size_t seed) {
    operands::all_gather(rank, Element::kFloat32, numel, heap, seed, seed % 2 == 0);
  });
}

TEST(reduce_scatter_of_all_lengths_in_all_places) {
  for_all(4, [](Rank& rank, std::size_t numel, bool heap, std::size_t seed) {
    operands::reduce_scatter(rank, {Element::kFloat32, Reduction::kSum}, numel, heap, seed,
                             seed % 4 != 0);
  });
}

TEST(reduce_scatter_around_its_part_of_a_slot) {
  for (const std::size_t ranks : kRanks) {
    check_none(run_threads(ranks, [&](Rank& rank) {
      const std::size_t part = fastddp::shm::kSlotBytes / ranks / 64 * 64 / 4;
      for (const std::size_t numel : {part - 1, part, part + 1, 3 * part + 1})
        operands::reduce_scatter(rank, {Element::kFloat32, Reduction::kSum}, numel, false, numel,
                                 false);
    }));
  }
}

TEST(every_element_and_reduction_on_every_path) {
  for (const std::size_t ranks : {2u, 3u, 5u}) {
    check_none(run_threads(ranks, [](Rank& rank) {
      for (const Case& what : kCases) {
        CHECK(fastddp::find_reduce(what.element, what.reduction) != nullptr);
        const std::size_t slot = fastddp::shm::kSlotBytes / fastddp::size_of(what.element);
        for (const std::size_t numel : {std::size_t{7}, slot / 2 + 1, slot + 1}) {
          for (const bool heap : {false, true}) {
            operands::all_reduce(rank, what, numel, heap, numel);
            operands::reduce_scatter(rank, what, numel, heap, numel, heap);
            operands::all_gather(rank, what.element, numel, heap, numel, heap);
            operands::broadcast(rank, what.element, numel, heap, numel, rank.ranks - 1);
          }
        }
      }
    }));
  }
}

// Values with a float sum that depends on the order, which is that of the ranks on every path.
TEST(sums_are_taken_in_the_order_of_the_ranks) {
  const std::vector<float> values{1.0f, 0x1p-24f, 0x1p-24f, 1e8f, -1e8f};
  for (const std::size_t numel : {std::size_t{3}, std::size_t{5000}, std::size_t{70000}}) {
    for (const bool heap : {false, true}) {
      check_none(run_threads(values.size(), [&](Rank& rank) {
        float expected = values[0];
        for (std::size_t i = 1; i < values.size(); ++i) expected += values[i];
        operands::Buffer buffer(heap, Element::kFloat32, numel);
        buffer.fill(0, numel, {values[rank.me]});
        rank.collectives.all_reduce(buffer.operand(), Reduction::kSum, 1, soon());
        buffer.check(0, numel, {expected});
      }));
    }
  }
}

// A stand-in for other hosts that have the same values as this one.
class SameThere final : public fastddp::shm::CrossHosts {
 public:
  void compare(const fastddp::shm::Call& call) override { compared_ = call.numel; }
  void start(void* data, std::size_t numel) override {
    CHECK(++under_way_ <= 2);
    crossed_ += numel;
    for (std::size_t i = 0; i < numel; ++i) {
      const float value = operands::load_as<float>(static_cast<char*>(data), i);
      operands::store_as(static_cast<char*>(data), i, 2 * value);
    }
  }
  void finish() override { CHECK(--under_way_ >= 0); }

  std::uint64_t compared_ = 0;
  std::size_t crossed_ = 0;
  int under_way_ = 0;
};

TEST(an_all_reduce_across_hosts_crosses_each_element_once) {
  // Up to three pieces and a bit, so that pieces are staged in turn.
  const std::vector<std::size_t> lengths{0, 1, 100, 5001, 3 * fastddp::shm::kPieceBytes / 4 + 5};
  for (const std::size_t ranks : {1u, 2u, 3u}) {
    for (std::size_t lanes = 1; lanes <= ranks; ++lanes) {
      for (const std::size_t numel : lengths) {
        std::atomic<std::size_t> crossed{0};
        check_none(run_threads(ranks, [&](Rank& rank) {
          auto& heap = fastddp::shm::Heap::mine();
          void* const staging =
              heap.allocate(fastddp::shm::kStagedPieces * fastddp::shm::kPieceBytes);
          // In the heap on all ranks, on none, and on some.
          for (const bool here : {true, false, rank.me % 2 == 0}) {
            for (const Reduction reduction : {Reduction::kSum, Reduction::kAvg}) {
              operands::Buffer buffer(here, Element::kFloat32, numel);
              buffer.fill(0, numel, {static_cast<double>(rank.me + 1)});
              SameThere there;
              const auto all = static_cast<double>(2 * ranks);
              rank.collectives.all_reduce_across(buffer.operand(), reduction, all, lanes, there,
                                                 here ? nullptr : staging, soon());
              CHECK(there.under_way_ == 0);
              CHECK(there.compared_ == (rank.me < lanes ? numel : 0));
              crossed += there.crossed_;
              const double sum = static_cast<double>(ranks * (ranks + 1));
              buffer.check(
                  0, numel,
                  {reduction == Reduction::kAvg ? static_cast<double>(static_cast<float>(sum / all))
                                                : sum});
            }
          }
          heap.free(staging);
        }));
        CHECK(crossed == 6 * numel);
      }
    }
  }
}

TEST(empty_operands_may_be_null) {
  check_none(run_threads(2, [](Rank& rank) {
    const std::vector<void*> nothing{nullptr, nullptr};
    const fastddp::shm::Operand empty{nullptr, 0, Element::kFloat32};
    rank.collectives.all_reduce(empty, Reduction::kSum, 1, soon());
    rank.collectives.broadcast(empty, 0, soon());
    rank.collectives.all_gather(empty, nothing, soon());
    rank.collectives.reduce_scatter(empty, nothing, nullptr, Reduction::kSum, 1, soon());
  }));
}

TEST(random_sequences_at_random_paces) {
  for (unsigned seed = 0; seed < 6; ++seed) {
    const std::size_t ranks = 2 + seed % 4;
    check_none(run_threads(ranks, [&](Rank& rank) {
      std::mt19937 shared(seed);
      std::mt19937 own(1000 * (seed + 1) + static_cast<unsigned>(rank.me));
      for (int i = 0; i < 60; ++i) {
        if (own() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 500));
        operands::random_collective(rank, shared, own);
      }
    }));
  }
}

// Each rank in turn is late again and again, while collectives follow each other without a pause:
// slots that the late rank still has to read must not be overwritten.
TEST(slots_wait_for_the_slowest_reader) {
  check_none(run_threads(4, [](Rank& rank) {
    for (std::size_t i = 0; i < 200; ++i) {
      if (i / 10 % 4 == rank.me) std::this_thread::sleep_for(std::chrono::microseconds(300));
      const Case sum{Element::kFloat32, Reduction::kSum};
      switch (i % 4) {
        case 0:
          operands::all_reduce(rank, sum, 10, false, i);
          break;
        case 1:
          operands::broadcast(rank, Element::kFloat32, 100, false, i, i % 3);
          break;
        case 2:
          operands::all_gather(rank, Element::kFloat32, 20, false, i, false);
          break;
        default:
          operands::all_reduce(rank, sum, 33000, false, i);
      }
    }
  }));
}

int main() { return check::run(); }
