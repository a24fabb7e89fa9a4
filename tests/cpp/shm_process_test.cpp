// Ranks as processes: they find each other as real ranks do, and die.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <random>
#include <string>
#include <thread>

#include "check.h"
#include "shm/error.h"
#include "shm_operands.h"
#include "shm_ranks.h"

using fastddp::Element;
using fastddp::Reduction;
using fastddp::shm::Error;
using ranks::Board;
using ranks::has;
using ranks::in;
using ranks::milliseconds;
using ranks::Processes;
using ranks::Rank;
using ranks::soon;
using ranks::steady_clock;

namespace {

void loop_for_ever(Rank& rank, unsigned seed, Board& board) {
  std::mt19937 shared(seed);
  std::mt19937 own(seed + static_cast<unsigned>(rank.me) + 1);
  for (;;) {
    operands::random_collective(rank, shared, own);
    board.progress.fetch_add(1);
  }
}

}  // namespace

TEST(processes_reduce_what_lies_in_each_others_heaps) {
  for (const std::size_t count : {1u, 2u, 4u, 8u}) {
    Processes processes(count, [](Rank& rank, Board&) {
      for (const std::size_t numel : {0u, 1u, 2047u, 2049u, 32769u, 100001u}) {
        for (const std::size_t heaps : {0u, 1u, 2u}) {
          const bool in_heap = heaps == 1 || (heaps == 2 && rank.me % 2 == 0);
          const operands::Case sum{Element::kFloat32, Reduction::kSum};
          operands::all_reduce(rank, sum, numel, in_heap, numel);
          operands::broadcast(rank, Element::kFloat32, numel, in_heap, numel, heaps % rank.ranks);
          operands::all_gather(rank, Element::kFloat32, numel, in_heap, numel, true);
          operands::reduce_scatter(rank, sum, numel, in_heap, numel, true);
          rank.collectives.barrier(soon());
        }
      }
    });
    ranks::check_none(processes.errors());
  }
}

TEST(processes_go_through_random_sequences) {
  for (unsigned seed = 0; seed < 3; ++seed) {
    Processes processes(3 + seed, [&](Rank& rank, Board&) {
      std::mt19937 shared(seed);
      std::mt19937 own(100 * (seed + 1) + static_cast<unsigned>(rank.me));
      for (int i = 0; i < 150; ++i) {
        if (own() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 300));
        operands::random_collective(rank, shared, own);
      }
    });
    ranks::check_none(processes.errors());
  }
}

TEST(whoever_is_left_hears_who_was_killed_and_how) {
  std::mt19937 random(11);
  for (unsigned trial = 0; trial < 10; ++trial) {
    const std::size_t count = 2 + random() % 3;
    const std::size_t victim = random() % count;
    Processes processes(count,
                        [&](Rank& rank, Board& board) { loop_for_ever(rank, trial, board); });
    ranks::wait_until([&] { return processes.board().progress >= 5; });
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30000));
    processes.signal(victim, SIGKILL);
    // Every other trial waits for the process at once: since Linux 6.15 its exit is known even
    // then.
    if (trial % 2 == 0) CHECK(WIFSIGNALED(processes.wait(victim)));
    const auto begin = steady_clock::now();
    for (std::size_t i = 0; i < count; ++i) {
      if (i == victim) continue;
      const std::string error = processes.error_of(i);
      CHECK(has(error, "rank " + std::to_string(i) + ": collective "));
      CHECK(has(error, "rank " + std::to_string(victim) + " (process "));
      CHECK(has(error, "was killed by signal 9 (Killed") ||
            (trial % 2 == 0 && has(error, "has ended")));
    }
    CHECK(steady_clock::now() - begin < std::chrono::seconds(2));
  }
}

TEST(one_that_exits_before_it_takes_part_is_named_with_its_status) {
  Processes processes(3, [](Rank& rank, Board&) {
    rank.collectives.barrier(soon());
    if (rank.me == 1) ::_exit(3);
    rank.collectives.barrier(soon());
  });
  for (const std::size_t i : {0u, 2u}) {
    const std::string error = processes.error_of(i);
    CHECK(has(error, "collective 2 (barrier)"));
    CHECK(has(error, "exited with status 3 before it took part"));
  }
}

TEST(one_that_leaves_and_ends_does_not_disturb_what_it_took_part_in) {
  for (int i = 0; i < 20; ++i) {
    Processes processes(3, [](Rank& rank, Board&) {
      operands::all_reduce(rank, {Element::kFloat32, Reduction::kSum}, 50000, true, 1);
      operands::broadcast(rank, Element::kFloat32, 50000, true, 1, 2);
      operands::all_gather(rank, Element::kFloat32, 100, false, 1, true);
    });
    ranks::check_none(processes.errors());
  }
}

TEST(one_that_is_stopped_before_it_takes_part_runs_into_the_deadline) {
  Processes processes(3, [](Rank& rank, Board& board) {
    rank.collectives.barrier(soon());
    constexpr std::size_t kNumel = 10000;
    operands::Buffer buffer(true, Element::kFloat32, kNumel);
    buffer.fill(0, kNumel, {1.0});
    if (rank.me == 1) {
      board.progress = 1;
      ::raise(SIGSTOP);
      return rank.collectives.all_reduce(buffer.operand(), Reduction::kSum, 1, soon());
    }
    ranks::wait_until([&] { return board.progress == 1; });
    try {
      rank.collectives.all_reduce(buffer.operand(), Reduction::kSum, 1, in(milliseconds(300)));
    } catch (const Error&) {
      board.progress.fetch_add(1);
      ranks::wait_until([&] { return board.progress == 4; });
      buffer.check(0, kNumel, {1.0});
      throw;
    }
  });
  ranks::wait_until([&] { return processes.board().progress == 3; });
  processes.signal(1, SIGCONT);
  const std::string late = processes.error_of(1);
  CHECK(has(late, "rank 1: collective 2") && has(late, "timed out"));
  processes.board().progress = 4;
  for (const std::size_t i : {0u, 2u}) {
    const std::string error = processes.error_of(i);
    CHECK(has(error, "rank " + std::to_string(i) + ": collective 2 (all_reduce of 10000 float32"));
    CHECK(has(error, "timed out: rank 1 (process "));
    CHECK(has(error, "is stopped and has not called it"));
  }
}

TEST(one_that_is_stopped_in_the_midst_does_not_write_to_the_others_when_it_goes_on) {
  constexpr std::size_t kNumel = 100000;
  Processes processes(3, [](Rank& rank, Board& board) {
    operands::Buffer buffer(true, Element::kFloat32, kNumel);
    buffer.fill(0, kNumel, {1.0});
    rank.collectives.barrier(soon());
    // Ranks 0 and 1 wait for rank 2, which comes once rank 1 is stopped.
    if (rank.me == 1) board.progress = 1;
    if (rank.me == 2) ranks::wait_until([&] { return board.progress == 2; });
    try {
      rank.collectives.all_reduce(buffer.operand(), Reduction::kSum, 1,
                                  rank.me == 2 ? in(milliseconds(300)) : soon());
    } catch (const Error&) {
      if (rank.me == 1) throw;
      board.progress.fetch_add(1);
      ranks::wait_until([&] { return board.progress == 5; });
      // Rank 1's third was not written, those of the others may have been.
      buffer.check_part(kNumel / 2 - 100, 200, {1.0});
      throw;
    }
  });
  ranks::wait_until([&] { return processes.board().progress == 1; });
  std::this_thread::sleep_for(milliseconds(50));
  processes.signal(1, SIGSTOP);
  std::this_thread::sleep_for(milliseconds(10));
  processes.board().progress = 2;
  ranks::wait_until([&] { return processes.board().progress == 4; });
  processes.signal(1, SIGCONT);
  const std::string late = processes.error_of(1);
  processes.board().progress = 5;
  for (const std::string& error : {late, processes.error_of(0), processes.error_of(2)})
    CHECK(has(error, "is stopped and has not finished its part"));
}

TEST(an_abort_reaches_the_other_processes) {
  Processes processes(3, [](Rank& rank, Board& board) {
    if (rank.me == 2) {
      ranks::wait_until([&] { return board.progress >= 6; });
      return rank.group.abort("enough");
    }
    board.progress.fetch_add(3);
    rank.collectives.barrier(soon());
  });
  CHECK(has(processes.error_of(0), "rank 0: collective 1 (barrier) failed: enough"));
  CHECK(has(processes.error_of(1), "rank 1: collective 1 (barrier) failed: enough"));
  CHECK(processes.error_of(2).empty());
}

TEST(a_mismatch_is_told_in_every_process) {
  Processes processes(3, [](Rank& rank, Board&) {
    operands::all_reduce(rank, {Element::kFloat32, Reduction::kSum}, 5000 + rank.me / 2, true, 0);
  });
  for (const std::string& error : processes.errors()) {
    CHECK(has(error, "called all_reduce of 5000 float32, sum, rank 2 called all_reduce of 5001"));
  }
}

TEST(a_process_is_opened_once_however_many_groups_it_is_in) {
  Processes processes(2, [](Rank& rank, Board& board) {
    const fastddp::shm::Address& peer = board.heaps[1 - rank.me];
    const auto before = ranks::count_open_files();  // the group of this test has it open
    const auto first = fastddp::shm::process_of(peer);
    const auto second = fastddp::shm::process_of(peer);
    CHECK(first == second && ranks::count_open_files() == before);
    // Of the same number, but another process: it had another heap.
    fastddp::shm::Address other = peer;
    other.nonce.low ^= 1;
    CHECK(fastddp::shm::process_of(other) != first);
    rank.collectives.barrier(soon());
  });
  ranks::check_none(processes.errors());
}

TEST(nothing_is_left_open_in_a_process) {
  Processes processes(2, [](Rank& rank, Board& board) {
    const auto before = ranks::count_open_files();
    {
      const fastddp::shm::Segment control = ranks::make_control(1);
      const auto heap = fastddp::shm::open_peer_heap(board.heaps[rank.me]);
      const auto process = std::make_shared<const fastddp::shm::Process>(::getpid());
      fastddp::shm::Group group({control.data(), 1}, {{0, heap->data(), heap->size(), process}}, 0);
      fastddp::shm::Collectives(group).barrier(soon());
      rank.collectives.barrier(soon());
    }
    CHECK(ranks::count_open_files() == before);
  });
  ranks::check_none(processes.errors());
}

int main() { return check::run(); }
