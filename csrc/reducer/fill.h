// How gradients get into their bucket, and what goes there where this rank has none.
//
// Invariant: on a GPU whatever touches a bucket waits for the streams that have touched it before,
// by events. (tests/streams)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/util/FunctionRef.h>

#include <cstddef>
#include <exception>
#include <memory>
#include <vector>

#include "reducer/bucket.h"
#include "reducer/manner.h"
#include "reducer/parameters.h"
#include "tensor/flatten.h"
#include "tensor/streams.h"

namespace fastddp {

// What this rank has for a parameter that the round's backward gave no gradient.
struct Leftover {
  at::Tensor grad;  // undefined when there is none
  bool counts;      // as a gradient of this round
};

// A gradient that the round's own backward did not produce, as it was before the round.
struct Bystander {
  std::size_t param;
  at::Tensor grad;  // undefined when there was none
};

// What was in the `.grad`s of parameters that got no gradient in the round's backward.
class Leftovers {
 public:
  Leftovers(const Parameters& params, Gives gives, int rank)
      : params_(params), gives_(gives), rank_(rank) {}

  // Takes what is in a parameter's `.grad`. `alias` is set if that is as it was handed out.
  Leftover take(std::size_t index, at::Tensor& alias);

  std::vector<Bystander>& bystanders() { return bystanders_; }
  const std::vector<Bystander>& bystanders() const { return bystanders_; }
  // What is wrong with one of them. It is for the end of the round: the other ranks wait for it.
  const std::exception_ptr& error() const { return error_; }

 private:
  const Parameters& params_;
  const Gives gives_;
  const int rank_;
  std::vector<Bystander> bystanders_;
  std::exception_ptr error_;
};

// A gradient that waits for the fused pass over its bucket.
struct Pending {
  std::size_t param;
  at::Tensor grad;
  c10::Stream stream;
};

// The state of a bucket in a round.
struct Filling {
  std::vector<Pending> pending;  // in the order of arrival
  bool is_flattened = false;
  Touched touched;
};

// Brings gradients into their bucket, one by one or in one pass. Which of the two is chosen once,
// when the reducer is made.
class Filler {
 public:
  using TakeLeftover = c10::function_ref<Leftover(std::size_t param)>;

  Filler() = default;
  virtual ~Filler() = default;
  Filler(const Filler&) = delete;
  Filler& operator=(const Filler&) = delete;

  // Whether buckets are filled in one pass, which scales their flags too.
  virtual bool is_fused() const = 0;
  // Takes the first gradient of a parameter.
  virtual void put(Filling& filling, std::size_t param, at::Tensor grad, double scale) const = 0;
  // Takes a further one, which a re-entrant checkpoint brings. The sum has the bits that it has on
  // the CPU.
  virtual void add(Filling& filling,
                   std::size_t param,
                   const at::Tensor& grad,
                   double scale) const = 0;
  // Called when the bucket has all of its gradients.
  virtual void complete(Filling& filling, const Bucket& bucket, double scale) const = 0;
  // Called before the bucket is launched, with the slots that have got no gradient: these are
  // filled with leftovers or zeros, and the flags are set.
  virtual void fill_missing(Filling& filling,
                            const Bucket& bucket,
                            const std::vector<std::size_t>& missing,
                            TakeLeftover take_leftover,
                            double scale) const = 0;
};

// Each gradient on its own, as it arrives.
class OneByOne final : public Filler {
 public:
  explicit OneByOne(const Parameters& params) : params_(params) {}

  bool is_fused() const override { return false; }
  void put(Filling& filling, std::size_t param, at::Tensor grad, double scale) const override;
  void add(Filling& filling,
           std::size_t param,
           const at::Tensor& grad,
           double scale) const override;
  void complete(Filling& /*filling*/, const Bucket& /*bucket*/, double /*scale*/) const override {}
  void fill_missing(Filling& filling,
                    const Bucket& bucket,
                    const std::vector<std::size_t>& missing,
                    TakeLeftover take_leftover,
                    double scale) const override;

 private:
  const Parameters& params_;
};

// Gradients are put by until their bucket is full; one pass then brings all of them there, and the
// flags. On a GPU that is one kernel.
class Fused final : public Filler {
 public:
  Fused(const Parameters& params, c10::Device device) : params_(params), device_(device) {}

  bool is_fused() const override { return true; }
  void put(Filling& filling, std::size_t param, at::Tensor grad, double scale) const override;
  void add(Filling& filling,
           std::size_t param,
           const at::Tensor& grad,
           double scale) const override;
  void complete(Filling& filling, const Bucket& bucket, double scale) const override;
  void fill_missing(Filling& filling,
                    const Bucket& bucket,
                    const std::vector<std::size_t>& missing,
                    TakeLeftover take_leftover,
                    double scale) const override;

 private:
  void add_piece(std::vector<FlatPiece>& pieces,
                 const Bucket& bucket,
                 std::size_t param,
                 const at::Tensor& grad,
                 double scale) const;
  void add_flags(std::vector<FlatPiece>& pieces,
                 const Bucket& bucket,
                 const std::vector<std::size_t>& uncounted) const;

  const Parameters& params_;
  const c10::Device device_;
};

}  // namespace fastddp
