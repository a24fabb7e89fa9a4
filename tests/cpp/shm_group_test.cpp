// How the ranks of a group keep step, and how groups fail. Ranks are threads.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "event_ring.h"
#include "shm/error.h"
#include "shm/label.h"
#include "shm_ranks.h"

using fastddp::Element;
using fastddp::Reduction;
using fastddp::shm::Error;
using fastddp::shm::kCallsKept;
using fastddp::shm::Kind;
using fastddp::shm::Label;
using fastddp::shm::Operand;
using fastddp::shm::Time;
using ranks::has;
using ranks::in;
using ranks::milliseconds;
using ranks::Rank;
using ranks::run_threads;
using ranks::soon;
using ranks::wait_until;

namespace {

constexpr std::size_t kNumel = 5000;  // of float32: more bytes than travel with the first step

using Action = void (*)(Rank&, float* data);

void sum_of(Rank& rank, float* data, std::size_t numel) {
  rank.collectives.all_reduce({data, numel, Element::kFloat32}, Reduction::kSum, 1, soon());
}

// Rank 1 calls `odd`, the others `even`. All have to throw, with both texts in the message.
void check_mismatch(Action even,
                    const std::string& even_text,
                    Action odd,
                    const std::string& odd_text) {
  for (const bool in_heap : {false, true}) {
    const auto errors = run_threads(3, [&](Rank& rank) {
      std::vector<float> ordinary(3 * kNumel, 1.0f);
      auto* data = ordinary.data();
      if (in_heap) {
        data = static_cast<float*>(fastddp::shm::Heap::mine().allocate(3 * kNumel * 4));
        std::fill(data, data + 3 * kNumel, 1.0f);
      }
      try {
        (rank.me == 1 ? odd : even)(rank, data);
      } catch (const Error& error) {
        // No operand may have been overwritten.
        CHECK(std::all_of(data, data + 3 * kNumel, [](float value) { return value == 1.0f; }));
        throw;
      }
    });
    for (std::size_t me = 0; me < errors.size(); ++me) {
      CHECK(has(errors[me], "rank " + std::to_string(me) + ": collective 1 ("));
      CHECK(has(errors[me], "do not agree"));
      CHECK(has(errors[me], "rank 1 called " + odd_text));
      CHECK(has(errors[me], "rank 0 called " + even_text) ||
            has(errors[me], "rank 2 called " + even_text));
    }
  }
}

}  // namespace

TEST(ranks_that_call_different_collectives_all_hear_of_it) {
  check_mismatch([](Rank& rank, float* data) { sum_of(rank, data, kNumel); },
                 "all_reduce of 5000 float32, sum",
                 [](Rank& rank, float*) { rank.collectives.barrier(soon()); }, "barrier");
}

TEST(ranks_that_differ_in_the_length_all_hear_of_it) {
  const Action sum = [](Rank& rank, float* data) { sum_of(rank, data, kNumel); };
  check_mismatch(
      sum, "all_reduce of 5000 float32",
      [](Rank& rank, float* data) { sum_of(rank, data, kNumel + 1); },
      "all_reduce of 5001 float32");
  check_mismatch(
      sum, "all_reduce of 5000 float32", [](Rank& rank, float* data) { sum_of(rank, data, 1); },
      "all_reduce of 1 float32");
  check_mismatch([](Rank& rank, float* data) { sum_of(rank, data, 2); }, "all_reduce of 2 float32",
                 [](Rank& rank, float* data) { sum_of(rank, data, 1); }, "all_reduce of 1 float32");
}

TEST(ranks_that_differ_in_the_element_all_hear_of_it) {
  check_mismatch([](Rank& rank, float* data) { sum_of(rank, data, kNumel); },
                 "all_reduce of 5000 float32, sum",
                 [](Rank& rank, float* data) {
                   rank.collectives.all_reduce({data, kNumel, Element::kInt32}, Reduction::kSum, 1,
                                               soon());
                 },
                 "all_reduce of 5000 int32, sum");
}

TEST(ranks_that_differ_in_the_reduction_all_hear_of_it) {
  check_mismatch([](Rank& rank, float* data) { sum_of(rank, data, kNumel); },
                 "all_reduce of 5000 float32, sum",
                 [](Rank& rank, float* data) {
                   rank.collectives.all_reduce({data, kNumel, Element::kFloat32}, Reduction::kMax,
                                               1, soon());
                 },
                 "all_reduce of 5000 float32, maximum");
}

TEST(ranks_that_differ_in_the_root_all_hear_of_it) {
  check_mismatch(
      [](Rank& rank, float* data) {
        rank.collectives.broadcast({data, kNumel, Element::kFloat32}, 0, soon());
      },
      "broadcast with root 0 of 5000 float32",
      [](Rank& rank, float* data) {
        rank.collectives.broadcast({data, kNumel, Element::kFloat32}, 1, soon());
      },
      "broadcast with root 1 of 5000 float32");
}

TEST(ranks_that_reduce_for_different_owners_all_hear_of_it) {
  fastddp::shm::name_owner(71, "model 'Critic' (the first one wrapped)");
  fastddp::shm::name_owner(72, "model 'Critic' (the second one wrapped)");
  const Action even = [](Rank& rank, float* data) {
    const Label label(Label::of(71, 2));
    sum_of(rank, data, kNumel);
  };
  check_mismatch(
      even, "all_reduce of 5000 float32, sum, for bucket 2 of model 'Critic' (the first",
      [](Rank& rank, float* data) {
        const Label label(Label::of(72, 2));
        sum_of(rank, data, kNumel);
      },
      "all_reduce of 5000 float32, sum, for bucket 2 of model 'Critic' (the second");
  check_mismatch(
      even, "all_reduce of 5000 float32, sum, for bucket 2 of",
      [](Rank& rank, float* data) {
        const Label label(Label::of(71, 3));
        sum_of(rank, data, kNumel);
      },
      "all_reduce of 5000 float32, sum, for bucket 3 of");
  check_mismatch(
      even, "all_reduce of 5000 float32, sum, for bucket 2 of",
      [](Rank& rank, float* data) { sum_of(rank, data, kNumel); },
      "all_reduce of 5000 float32, sum, for the script itself");
}

TEST(ranks_that_reduce_for_different_owners_hear_what_to_do) {
  const auto errors_of = [](std::uint64_t first, std::uint64_t second) {
    return run_threads(2, [&](Rank& rank) {
      const Label label(rank.me == 0 ? first : second);
      float value = 1;
      sum_of(rank, &value, 1);
    });
  };
  const std::string hint = "must be built and run in the same order on all ranks";
  for (const std::string& error : errors_of(Label::of(1, 0), Label::of(2, 0)))
    CHECK(has(error, hint));
  for (const std::string& error : errors_of(Label::of(1, 0), Label::of(1, 1)))
    CHECK(!has(error, hint));
  for (const std::string& error : errors_of(Label::of(1, 0), 0)) CHECK(!has(error, hint));
  ranks::check_none(errors_of(Label::of(3, 1), Label::of(3, 1)));
}

TEST(labels_end_with_their_scope_and_are_a_threads_own) {
  CHECK(Label::current() == 0);
  {
    const Label outer(Label::of(1, 2));
    {
      const Label inner(Label::of(3, 4));
      CHECK(Label::current() == Label::of(3, 4));
      std::thread([] { CHECK(Label::current() == 0); }).join();
    }
    CHECK(Label::current() == Label::of(1, 2));
    CHECK(Label::set(7) == Label::of(1, 2));
  }
  CHECK(Label::current() == 0);
}

TEST(owners_are_named_in_short_and_the_oldest_forgotten) {
  using fastddp::shm::describe_label;
  using fastddp::shm::kOwnersKept;
  using fastddp::shm::name_owner;
  name_owner(5, "model 'A'");
  CHECK(describe_label(Label::of(5)) == "model 'A'");
  CHECK(describe_label(Label::of(5, 0)) == "bucket 0 of model 'A'");
  CHECK(describe_label(0) == "the script itself");
  CHECK(describe_label(Label::of(6, 1)) == "bucket 1 of the wrapped model number 6");
  std::string accents;  // two bytes each, after one
  for (int i = 0; i < 300; ++i) accents += "\u00e9";
  name_owner(5, "a" + accents);
  CHECK(describe_label(Label::of(5)) == "a" + accents.substr(0, 198) + "...");
  for (std::uint32_t owner = 1000; owner < 1000 + kOwnersKept; ++owner) name_owner(owner, "one");
  CHECK(describe_label(Label::of(5)) == "the wrapped model number 5");
  CHECK(describe_label(Label::of(1000)) == "one");
}

TEST(one_that_hands_on_what_the_others_do_here_is_found_out) {
  const auto errors = run_threads(2, [](Rank& rank) {
    std::vector<float> data(kNumel);
    if (rank.me == 0) return sum_of(rank, data.data(), kNumel);
    rank.collectives.announce(Kind::kScatter, 0, soon());
    rank.collectives.barrier(soon());
  });
  for (const std::string& error : errors) CHECK(has(error, "rank 1 called scatter"));
}

TEST(handed_on_calls_wait_for_nobody) {
  std::atomic<bool> announced{false};
  ranks::check_none(run_threads(3, [&](Rank& rank) {
    if (rank.me != 0) wait_until([&] { return announced.load(); });
    for (std::size_t i = 0; i < 5 * kCallsKept; ++i)
      rank.collectives.announce(Kind::kReduce, 0, soon());
    announced = true;
    rank.collectives.barrier(soon());
  }));
}

TEST(one_that_is_many_handed_on_calls_ahead_is_known_to_have_agreed) {
  for (const std::size_t ahead : {std::size_t{1}, kCallsKept - 1, kCallsKept, 3 * kCallsKept}) {
    std::atomic<int> finished{0};
    ranks::check_none(run_threads(3, [&](Rank& rank) {
      rank.collectives.barrier(soon());
      if (rank.me == 0) {
        // Like barrier(), but the rank loses its core between the step and the comparison.
        rank.group.begin({.kind = Kind::kBarrier}, soon());
        const Time step = rank.group.advance();
        wait_until([&] { return finished == 2; });
        rank.group.await_all(step);
      } else {
        rank.collectives.barrier(soon());
      }
      for (std::size_t i = 0; i < ahead; ++i) rank.collectives.announce(Kind::kGather, 0, soon());
      ++finished;
      rank.collectives.barrier(soon());
    }));
  }
}

TEST(one_that_is_many_handed_on_calls_ahead_is_known_not_to_have_agreed) {
  std::atomic<bool> ahead{false};
  const auto errors = run_threads(2, [&](Rank& rank) {
    rank.collectives.barrier(soon());
    if (rank.me == 0) wait_until([&] { return ahead.load(); });
    for (std::size_t i = 0; i < 2 * kCallsKept && rank.me == 1; ++i)
      rank.collectives.announce(Kind::kGather, 0, soon());
    ahead = true;
    rank.collectives.barrier(soon());
  });
  for (const std::string& error : errors) CHECK(has(error, "rank 1 called another collective"));
}

TEST(an_abort_reaches_all_ranks_and_stays) {
  for (const std::size_t count : {1u, 2u, 4u}) {
    const auto errors = run_threads(count, [&](Rank& rank) {
      std::thread other;
      if (rank.me == 0) {
        other = std::thread([&] {
          std::this_thread::sleep_for(milliseconds(10));
          rank.group.abort("enough");
        });
      }
      std::string text;
      try {
        for (;;) rank.collectives.barrier(soon());
      } catch (const Error& error) {
        text = error.what();
      }
      if (other.joinable()) other.join();
      CHECK(rank.group.is_broken());
      CHECK_THROWS(rank.group.check(), Error);
      CHECK_THROWS(rank.collectives.barrier(soon()), Error);
      throw Error(text);
    });
    for (const std::string& error : errors) CHECK(has(error, "(barrier) failed: enough"));
  }
}

TEST(an_abort_wakes_those_who_wait) {
  const auto begin = ranks::steady_clock::now();
  const auto errors = run_threads(3, [&](Rank& rank) {
    if (rank.me == 2) {
      std::this_thread::sleep_for(milliseconds(30));
      return rank.group.abort("enough");
    }
    rank.collectives.barrier(soon());
  });
  CHECK(has(errors[0], "enough") && has(errors[1], "enough") && errors[2].empty());
  CHECK(ranks::steady_clock::now() < begin + std::chrono::seconds(30));
}

TEST(the_first_verdict_is_everybodys_and_long_ones_are_cut) {
  const auto errors = run_threads(8, [](Rank& rank) {
    rank.group.abort("rank " + std::to_string(rank.me) + " says " + std::string(5000, 'x'));
    rank.group.check();
  });
  std::set<std::string> reasons;
  for (const std::string& error : errors) {
    CHECK(error.size() < 2300);
    reasons.insert(error.substr(error.find(" failed: ")));
  }
  CHECK(reasons.size() == 1);
}

TEST(what_one_that_left_took_part_in_is_finished_and_nothing_after) {
  std::atomic<bool> has_left{false};
  const auto errors = run_threads(3, [&](Rank& rank) {
    if (rank.me == 1) {
      rank.group.begin({.kind = Kind::kBarrier}, soon());
      rank.group.advance();
      rank.group.leave();
      has_left = true;
      return;
    }
    wait_until([&] { return has_left.load(); });
    rank.collectives.barrier(soon());
    rank.collectives.barrier(soon());
  });
  CHECK(errors[1].empty());
  for (const std::size_t me : {0u, 2u}) {
    CHECK(has(errors[me], "collective 2 (barrier)"));
    CHECK(has(errors[me], "rank 1 has left the group before it took part"));
  }
}

TEST(one_that_leaves_in_the_midst_is_told_from_one_that_never_came) {
  const auto errors = run_threads(2, [](Rank& rank) {
    if (rank.me == 0) {
      rank.group.begin({.kind = Kind::kAllReduce, .element = Element::kFloat32, .numel = kNumel},
                       soon());
      rank.group.advance();
      return rank.group.leave();
    }
    std::vector<float> data(kNumel);
    sum_of(rank, data.data(), kNumel);
  });
  CHECK(has(errors[1], "rank 0 has left the group in the midst of it"));
}

TEST(a_deadline_names_the_ranks_that_are_missing) {
  std::atomic<int> failed{0};
  const auto errors = run_threads(4, [&](Rank& rank) {
    if (rank.me == 1 || rank.me == 3) return wait_until([&] { return failed == 2; });
    try {
      rank.collectives.barrier(in(milliseconds(150)));
    } catch (const Error&) {
      ++failed;
      throw;
    }
  });
  for (const std::size_t me : {0u, 2u}) {
    CHECK(has(errors[me], "timed out: rank 1 (process " + std::to_string(::getpid()) +
                              ") is running and has not called it, rank 3 (process"));
    CHECK(!has(errors[me].substr(errors[me].find("timed out")), "rank 0"));
    CHECK(!has(errors[me].substr(errors[me].find("timed out")), "rank 2"));
  }
}

TEST(a_deadline_in_the_midst_says_so) {
  std::atomic<bool> failed{false};
  const auto errors = run_threads(2, [&](Rank& rank) {
    if (rank.me == 0) {
      rank.group.begin({.kind = Kind::kAllReduce, .element = Element::kFloat32, .numel = kNumel},
                       soon());
      rank.group.advance();
      return wait_until([&] { return failed.load(); });
    }
    std::vector<float> data(kNumel);
    try {
      rank.collectives.all_reduce({data.data(), kNumel, Element::kFloat32}, Reduction::kSum, 1,
                                  in(milliseconds(100)));
    } catch (const Error&) {
      failed = true;
      throw;
    }
  });
  CHECK(has(errors[1], "rank 0") && has(errors[1], "has not finished its part"));
}

TEST(a_deadline_that_has_passed_does_not_matter_to_those_who_need_not_wait) {
  std::atomic<bool> there{false};
  ranks::check_none(run_threads(2, [&](Rank& rank) {
    if (rank.me == 1) {
      wait_until([&] { return there.load(); });
      return rank.collectives.barrier(in(milliseconds(-1)));
    }
    rank.group.begin({.kind = Kind::kBarrier}, soon());
    const Time step = rank.group.advance();
    there = true;
    rank.group.await_all(step);
  }));
}

// ---- a neighbour that writes what it should not ------------------------------------------

TEST(a_place_outside_of_a_heap_is_refused_before_it_is_read_or_written) {
  const fastddp::shm::Heap& heap = fastddp::shm::Heap::mine();
  const std::uint64_t bytes = kNumel * sizeof(float);
  for (const std::uint64_t place :
       {heap.size() - bytes + 4, heap.size(), heap.size() + (1u << 20), ~std::uint64_t{0} - 3,
        ~std::uint64_t{0} - bytes, heap.size() - bytes - 2}) {
    for (const Kind kind : {Kind::kAllReduce, Kind::kAllGather, Kind::kBroadcast}) {
      const auto errors = run_threads(2, [&](Rank& rank) {
        if (rank.me == 1) {
          rank.group.begin(
              {.kind = kind, .element = Element::kFloat32, .numel = kNumel, .operand = place},
              soon());
          rank.group.await_all(rank.group.advance());
          return rank.group.await_all(rank.group.advance());
        }
        auto* const data = static_cast<float*>(fastddp::shm::Heap::mine().allocate(bytes));
        std::fill(data, data + kNumel, 1.0f);
        const Operand mine{data, kNumel, Element::kFloat32};
        std::vector<float> others(kNumel);
        void* const outputs[] = {data, others.data()};
        try {
          if (kind == Kind::kAllReduce)
            rank.collectives.all_reduce(mine, Reduction::kSum, 1, soon());
          if (kind == Kind::kAllGather) rank.collectives.all_gather(mine, outputs, soon());
          if (kind == Kind::kBroadcast) rank.collectives.broadcast(mine, 1, soon());
        } catch (const Error&) {
          CHECK(std::all_of(data, data + kNumel, [](float value) { return value == 1.0f; }));
          throw;
        }
      });
      if (kind == Kind::kBroadcast) {
        CHECK(has(errors[0], "do not agree"));  // its root is another one
      } else {
        for (const std::string& error : errors)
          CHECK(has(error, "rank 1 announced 20000 bytes at offset " + std::to_string(place)));
      }
    }
  }
}

TEST(a_block_for_all_ranks_must_fit_as_a_whole) {
  const fastddp::shm::Heap& heap = fastddp::shm::Heap::mine();
  const std::uint64_t bytes = kNumel * sizeof(float);
  const auto errors = run_threads(2, [&](Rank& rank) {
    if (rank.me == 1) {
      rank.group.begin({.kind = Kind::kReduceScatter,
                        .element = Element::kFloat32,
                        .numel = kNumel,
                        .operand = heap.size() - bytes},
                       soon());
      rank.group.await_all(rank.group.advance());
      return rank.group.await_all(rank.group.advance());
    }
    std::vector<float> output(kNumel);
    auto* const block = static_cast<float*>(fastddp::shm::Heap::mine().allocate(2 * bytes));
    void* const inputs[] = {block, block + kNumel};
    rank.collectives.reduce_scatter({output.data(), kNumel, Element::kFloat32}, inputs, block,
                                    Reduction::kSum, 1, soon());
  });
  for (const std::string& error : errors) CHECK(has(error, "rank 1 announced 40000 bytes"));
}

TEST(pieces_are_for_what_crosses_hosts_only) {
  const std::size_t staging = fastddp::shm::kStagedPieces * fastddp::shm::kPieceBytes;
  const std::size_t numel = staging;  // of four bytes: more than there is room for
  auto& heap = fastddp::shm::Heap::mine();
  auto* const pieces = static_cast<char*>(heap.allocate(staging));
  const auto errors = run_threads(2, [&](Rank& rank) {
    if (rank.me == 1) {
      rank.group.begin({.kind = Kind::kAllReduce,
                        .element = Element::kFloat32,
                        .numel = numel,
                        .operand = static_cast<std::uint64_t>(pieces - heap.data()),
                        .staged = true},
                       soon());
      rank.group.await_all(rank.group.advance());
      return rank.group.await_all(rank.group.advance());
    }
    auto* const data = static_cast<float*>(heap.allocate(numel * sizeof(float)));
    rank.collectives.all_reduce({data, numel, Element::kFloat32}, Reduction::kSum, 1, soon());
  });
  for (const std::string& error : errors)
    CHECK(has(error, "rank 1 announced " + std::to_string(staging) + " bytes for pieces"));
}

// Never called: the ranks have to find the fault before they cross hosts.
class Nowhere final : public fastddp::shm::CrossHosts {
 public:
  void compare(const fastddp::shm::Call&) override { CHECK(false); }
  void start(void*, std::size_t) override { CHECK(false); }
  void finish() override { CHECK(false); }
};

TEST(what_crosses_hosts_has_to_lie_in_heaps) {
  auto& heap = fastddp::shm::Heap::mine();
  const auto errors = run_threads(2, [&](Rank& rank) {
    if (rank.me == 1) {
      rank.group.begin({.kind = Kind::kAllReduce, .element = Element::kFloat32, .numel = kNumel},
                       soon());
      rank.group.await_all(rank.group.advance());
      return rank.group.await_all(rank.group.advance());
    }
    auto* const data = static_cast<float*>(heap.allocate(kNumel * sizeof(float)));
    Nowhere nowhere;
    rank.collectives.all_reduce_across({data, kNumel, Element::kFloat32}, Reduction::kSum, 1, 1,
                                       nowhere, nullptr, soon());
  });
  for (const std::string& error : errors)
    CHECK(has(error, "rank 1 announced 20000 bytes outside of its heap"));
}

TEST(kinds_types_and_texts_that_mean_nothing_are_an_error) {
  const fastddp::shm::Call garbage[] = {
      {.kind = static_cast<Kind>(200), .numel = 1},
      {.kind = Kind::kAllReduce, .element = static_cast<Element>(99), .numel = 1},
      {.kind = Kind::kAllReduce,
       .element = Element::kFloat32,
       .reduction = static_cast<Reduction>(77),
       .numel = 1},
      {.kind = Kind::kAllReduce,
       .element = Element::kFloat32,
       .type = {'\x01', '\xff', 'x'},
       .numel = 1},
  };
  for (const fastddp::shm::Call& call : garbage) {
    const auto errors = run_threads(2, [&](Rank& rank) {
      float value = 1;
      if (rank.me == 0) return sum_of(rank, &value, 1);
      rank.group.begin(call, soon());
      rank.group.await_all(rank.group.advance());
    });
    for (const std::string& error : errors) CHECK(has(error, "do not agree"));
  }
}

TEST(a_verdict_without_an_end_is_read_no_further_than_it_goes) {
  const auto control = ranks::make_control(1);
  const fastddp::shm::Layout layout(control.data(), 1);
  const auto process = std::make_shared<const fastddp::shm::Process>(::getpid());
  fastddp::shm::Heap& heap = fastddp::shm::Heap::mine();
  fastddp::shm::Group group(layout, {{0, heap.data(), heap.size(), process}}, 0);
  auto& verdict = layout.header().verdict;
  verdict.text.fill('x');
  verdict.is = fastddp::shm::Verdict::Is::kWritten;
  try {
    group.check();
    CHECK(false);
  } catch (const Error& error) {
    CHECK(has(error.what(), std::string(verdict.text.size(), 'x')));
    CHECK(!has(error.what(), std::string(verdict.text.size() + 1, 'x')));
  }
}

TEST(a_length_beyond_its_slot_is_read_no_further_than_it_goes) {
  const auto errors = run_threads(2, [](Rank& rank) {
    rank.collectives.begin_elsewhere(Kind::kGather, 0, soon());
    if (rank.me == 1) {
      const std::size_t slot = rank.group.claim_slot();
      std::memset(rank.group.slot(1, slot), 0xFF, sizeof(std::uint64_t));
      rank.group.await_all(rank.group.advance());
      return;
    }
    const auto all = rank.collectives.exchange("mine");
    CHECK(all[0] == "mine");
    CHECK(all[1].size() == fastddp::shm::kSlotBytes - sizeof(std::uint64_t));
  });
  ranks::check_none(errors);
}

// ---- what else may be wrong ---------------------------------------------------------------

TEST(ranks_exchange_texts_of_any_length) {
  ranks::check_none(run_threads(3, [](Rank& rank) {
    for (const std::size_t length : {0u, 1u, 1000u, 100000u}) {
      rank.collectives.begin_elsewhere(Kind::kAllToAll, 0, soon());
      for (int turn = 0; turn < 2; ++turn) {
        const auto all = rank.collectives.exchange(
            std::string(length + rank.me, static_cast<char>('a' + rank.me + turn)));
        for (std::size_t i = 0; i < 3; ++i)
          CHECK(all[i] == std::string(length + i, static_cast<char>('a' + i + turn)));
      }
    }
  }));
}

TEST(only_the_block_of_a_failed_collective_is_retired) {
  auto& heap = fastddp::shm::Heap::mine();
  const std::uint64_t bytes = kNumel * sizeof(float);
  auto* const used = static_cast<float*>(heap.allocate(bytes));
  void* const other = heap.allocate(bytes);
  const auto errors = run_threads(2, [&](Rank& rank) {
    if (rank.me == 1) return rank.group.abort("enough");
    sum_of(rank, used, kNumel);
  });
  CHECK(has(errors[0], "enough"));
  heap.free(other);
  CHECK(heap.allocate(bytes) == other);
  heap.free(used);
  CHECK(heap.allocate(bytes) != used);
}

TEST(a_reduction_that_does_not_exist_is_refused_before_it_begins) {
  ranks::check_none(run_threads(2, [](Rank& rank) {
    float value = 1;
    CHECK_THROWS(
        rank.collectives.all_reduce({&value, 1, Element::kFloat32}, Reduction::kBxor, 1, soon()),
        Error);
    CHECK(!rank.group.is_broken() && rank.group.count() == 0);
    rank.collectives.barrier(soon());
  }));
}

TEST(nothing_is_left_open) {
  fastddp::shm::Heap::mine();
  const auto before = ranks::count_open_files();
  ranks::check_none(run_threads(4, [](Rank& rank) { rank.collectives.barrier(soon()); }));
  CHECK(ranks::count_open_files() == before);
}

// ---- what is recorded ------------------------------------------------------------------

TEST(the_last_rank_to_come_is_recorded) {
  using fastddp::events::Kind;
  constexpr std::uint32_t kOwner = 7;
  constexpr std::uint64_t kLateNs = 50'000'000;
  event_ring::Ring ring(64);
  ring.use();
  ranks::check_none(run_threads(3, [&](Rank& rank) {
    const Label label(Label::of(kOwner, 1));
    std::vector<float> data(kNumel, 1.0f);
    if (rank.me == 2) std::this_thread::sleep_for(std::chrono::nanoseconds(kLateNs));
    sum_of(rank, data.data(), kNumel);
  }));
  CHECK(ring.next() == 9);
  std::map<Kind, int> count;
  for (std::size_t i = 0; i < ring.next(); ++i) {
    ++count[ring.kind(i)];
    CHECK(ring.owner(i) == kOwner && ring.word(i, 2) == 1);
    if (ring.kind(i) == Kind::kCollectiveMet) {
      CHECK(ring.word(i, 3) >> 40 == 2);
      CHECK((ring.word(i, 3) & ((std::uint64_t{1} << 40) - 1)) >= kLateNs);
    }
    if (ring.kind(i) == Kind::kCollectiveBegin)
      CHECK(ring.word(i, 3) == (kNumel * sizeof(float) | std::uint64_t{1} << 56));
  }
  CHECK(count[Kind::kCollectiveBegin] == 3 && count[Kind::kCollectiveMet] == 3);
  CHECK(count[Kind::kCollectiveEnd] == 3);
}

TEST(a_collective_that_fails_is_recorded_as_an_error) {
  using fastddp::events::Kind;
  event_ring::Ring ring(64);
  ring.use();
  const auto errors = run_threads(2, [](Rank& rank) {
    std::vector<float> data(kNumel, 1.0f);
    sum_of(rank, data.data(), rank.me == 0 ? kNumel : kNumel - 1);
  });
  for (const std::string& error : errors) CHECK(has(error, "do not agree"));
  CHECK(ring.next() == 4);
  int failed = 0;
  for (std::size_t i = 0; i < ring.next(); ++i) failed += ring.kind(i) == Kind::kError ? 1 : 0;
  CHECK(failed == 2);
}

int main() { return check::run(); }
