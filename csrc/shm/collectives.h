// The collectives, between ranks on one host.
//
// Operands in the ranks' heaps are read and written where they lie ("direct"): each rank reduces
// its share of the elements straight from all ranks' memory and writes the result to all of them.
// Other operands pass through slots of the group's segment in chunks, so that a chunk is still in
// the cache when it is reduced. Few bytes always go through slots, in the same step that announces
// the collective: that takes one wait instead of two.
//
// The choices follow the alpha-beta model, in which a message of n bytes takes alpha + n * beta (R.
// Hockney, 1994): few bytes are a matter of the number of waits, many bytes of the number of
// copies. (R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication
// Operations in MPICH", 2005)
//
// The order of summation is the order of the ranks, on every path, so all ranks and all runs get
// the same bits.
//
// Each collective has a file in collectives/; chunks.h there holds what they have in common.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "shm/group.h"

namespace fastddp::shm {

// The contiguous memory that one rank gives to a collective.
struct Operand {
  void* data = nullptr;
  std::size_t numel = 0;
  Element element = Element::kUInt8;
  TypeName type{};
  std::size_t bytes() const { return numel * size_of(element); }
};

// For a group that spans hosts: reduces parts of operands, in place, over the ranks that have the
// same parts on the other hosts. The parts lie in this rank's heap. All functions throw Error.
class CrossHosts {
 public:
  virtual ~CrossHosts() = default;
  // Throws if the other hosts are not about to do the same collective.
  virtual void compare(const Call& call) = 0;
  virtual void start(void* data, std::size_t numel) = 0;
  // Waits for the oldest part that was started and is not finished. There are at most two of them.
  virtual void finish() = 0;
};

class Collectives {
 public:
  explicit Collectives(Group& group) : group_(group) {}

  // All collectives throw Error, after which the group is broken. `divisor` is for Reduction::kAvg;
  // the other reductions ignore it.
  void barrier(Deadline deadline);
  void all_reduce(const Operand& operand, Reduction reduction, double divisor, Deadline deadline);
  void broadcast(const Operand& operand, int root, Deadline deadline);
  // `outputs` holds an address for each rank, with room for as many elements as the input has.
  void all_gather(const Operand& input, std::span<void* const> outputs, Deadline deadline);
  // `inputs` holds an address for each rank, of as many elements as the output has. `block` is the
  // address of the first input if the inputs lie one after another, and null otherwise.
  void reduce_scatter(const Operand& output,
                      std::span<void* const> inputs,
                      const void* block,
                      Reduction reduction,
                      double divisor,
                      Deadline deadline);

  // Like all_reduce(); the first `lanes` ranks of this host exchange their parts with other hosts.
  // `staging` is null for an operand in the heap; for any other it is room in the heap for
  // kStagedPieces pieces.
  void all_reduce_across(const Operand& operand,
                         Reduction reduction,
                         double divisor,
                         std::size_t lanes,
                         CrossHosts& cross,
                         void* staging,
                         Deadline deadline);

  // Announces a collective that another transport carries out, so that ranks that call another one
  // do not wait here for this rank. Waits for nobody.
  void announce(Kind kind, int root, Deadline deadline);

  // Like announce(), but has to be followed by exchange(). Of both, the caller records the end.
  void begin_elsewhere(Kind kind, int root, Deadline deadline);
  // Waits for all ranks. Returns the string that each of them gave, in the order of their indices;
  // the lengths may differ.
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
