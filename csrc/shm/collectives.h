// The collectives, between ranks on one host.
//
// Operands in the ranks' heaps are read and written where they lie ("direct"): each rank reduces
// its share of the elements straight from all ranks' memory and writes the result to all of them.
// Other operands pass through slots of the group's segment in chunks, so that what is copied in is
// still in the cache when it is reduced. Few bytes always do, in the very step that announces the
// collective: that makes one wait instead of two.
//
// The order of summation is the order of the ranks, on every path, so all ranks and all runs get
// the same bits.
//
// Each has a file in collectives/; chunks.h there holds what they have in common.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "shm/group.h"

namespace fastddp::shm {

// Contiguous memory of one rank.
struct Operand {
  void* data = nullptr;
  std::size_t numel = 0;
  Element element = Element::kUInt8;
  TypeName type{};
  std::size_t bytes() const { return numel * size_of(element); }
};

// Where a group spans hosts: reduces parts, which lie in this rank's heap, over the ranks that have
// the same parts on the other hosts. In place. All throw Error.
class CrossHosts {
 public:
  virtual ~CrossHosts() = default;
  // Makes sure that the other hosts are about to do the same.
  virtual void compare(const Call& call) = 0;
  virtual void start(void* data, std::size_t numel) = 0;
  // Waits for the oldest part that was started and is not finished; at most two are.
  virtual void finish() = 0;
};

class Collectives {
 public:
  explicit Collectives(Group& group) : group_(group) {}

  // All throw Error, after which the group is broken. `divisor` is for kAvg.
  void barrier(Deadline deadline);
  void all_reduce(const Operand& operand, Reduction reduction, double divisor, Deadline deadline);
  void broadcast(const Operand& operand, int root, Deadline deadline);
  // `outputs`: one address for each rank, of as many elements as the input has.
  void all_gather(const Operand& input, std::span<void* const> outputs, Deadline deadline);
  // `inputs`: one address for each rank, of as many elements as the output has. `block` is where
  // they lie if they lie one after another, else null.
  void reduce_scatter(const Operand& output,
                      std::span<void* const> inputs,
                      const void* block,
                      Reduction reduction,
                      double divisor,
                      Deadline deadline);

  // As all_reduce, with `lanes` of the ranks here exchanging their parts with other hosts.
  // `staging`: kStagedPieces pieces in the heap for an operand that is not there, else null.
  void all_reduce_across(const Operand& operand,
                         Reduction reduction,
                         double divisor,
                         std::size_t lanes,
                         CrossHosts& cross,
                         void* staging,
                         Deadline deadline);

  // Lets the others know what is next that another transport carries out, so that they do not wait
  // for this rank here. Waits for nobody.
  void announce(Kind kind, int root, Deadline deadline);

  // As announce(), and to be followed by exchange().
  void begin_elsewhere(Kind kind, int root, Deadline deadline);
  // Waits for all ranks. Returns what each gave, by its place; lengths may differ.
  std::vector<std::string> exchange(const std::string& mine);

 private:
  bool meet(std::size_t bytes);
  void stage(std::size_t slot, std::size_t at, const void* from, std::size_t bytes);
  template <typename Fill, typename Drain>
  void go_in_chunks(std::size_t count, const Fill& fill, const Drain& drain);
  void reduce_in_chunks(const Operand& operand, Reduce reduce, double divisor);
  void reduce_in_shares(const Operand& operand, Reduce reduce, double divisor);

  Group& group_;
};

}  // namespace fastddp::shm
