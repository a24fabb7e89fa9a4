// How a bucket or a sparse gradient is sent on its way: by an all-reduce, or by a communication
// hook. Each launcher knows what gradients are to be multiplied by, how they are to lie in a
// bucket, and whether buckets may be launched late.
//
// Invariant: a hook gets the next bucket when the last one is done, on the CPU, for callbacks of
// the hook communicate from other threads. (tests/parity/test_comm_hooks.py)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "reducer/bucket.h"
#include "reducer/context.h"
#include "reducer/launch.h"

namespace fastddp {

// What a communication hook is given: gradients as they are, not yet scaled.
struct HookInput {
  std::size_t index;
  std::size_t count;                  // of buckets, and of sparse gradients, in a round
  at::Tensor buffer;                  // the gradients and nothing else; or one sparse gradient
  std::vector<std::size_t> params;    // the parameters that these are the gradients of
  std::vector<std::int64_t> offsets;  // where in the buffer the gradient of each begins
};

// Starts to communicate. The result is in the buffer once the function that it returns has run.
using Hook = std::function<Wait(const HookInput&)>;

class Launcher {
 public:
  Launcher() = default;
  virtual ~Launcher() = default;
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // What gradients are multiplied by on the way into their bucket.
  virtual double scale(double divisor) const = 0;
  // How buckets have to be laid out for this launcher.
  virtual Form form() const = 0;
  // Whether all buckets may wait for the end of backward, if that is faster.
  virtual bool may_launch_late() const = 0;

  // Starts to reduce a bucket. `waits`: whether the caller goes on to wait for it at once.
  virtual Wait send(const Bucket& bucket, const LaunchNumbers& numbers, bool waits) const = 0;
  virtual Wait send_sparse(const LaunchId& id,
                           const at::Tensor& grad,
                           const LaunchNumbers& numbers) const = 0;
  // Called once all buckets and sparse gradients of a round are sent.
  virtual void end_buckets(std::vector<Launch>& launches) const = 0;
  // Keeps no reference to buckets that have been waited for.
  virtual void let_go() const = 0;
};

class AllReduceLauncher final : public Launcher {
 public:
  // `comm_dtype` is that of Form.
  AllReduceLauncher(const Context& context, std::optional<at::ScalarType> comm_dtype)
      : context_(context), comm_dtype_(comm_dtype) {}

  double scale(double divisor) const override { return 1.0 / divisor; }
  Form form() const override { return {/*packs=*/false, comm_dtype_}; }
  bool may_launch_late() const override { return context_.runs_inline; }
  Wait send(const Bucket& bucket, const LaunchNumbers& numbers, bool waits) const override;
  Wait send_sparse(const LaunchId& id,
                   const at::Tensor& grad,
                   const LaunchNumbers& numbers) const override;
  void end_buckets(std::vector<Launch>& /*launches*/) const override {}
  void let_go() const override {}

 private:
  const Context& context_;
  const std::optional<at::ScalarType> comm_dtype_;
};

class HookLauncher final : public Launcher {
 public:
  HookLauncher(const Context& context, Hook hook, std::function<void()> let_go);

  double scale(double /*divisor*/) const override { return 1.0; }
  Form form() const override { return {/*packs=*/true, std::nullopt}; }
  bool may_launch_late() const override { return false; }
  Wait send(const Bucket& bucket, const LaunchNumbers& numbers, bool waits) const override;
  Wait send_sparse(const LaunchId& id,
                   const at::Tensor& grad,
                   const LaunchNumbers& numbers) const override;
  // Waits for them: callbacks of the hook may communicate, and the flags come after. See HookRunner
  // in fastddp/engine/hooks.py.
  void end_buckets(std::vector<Launch>& launches) const override;
  void let_go() const override;

 private:
  Wait start(const HookInput& input) const;

  const Context& context_;
  const Hook hook_;
  const std::function<void()> let_go_;
};

}  // namespace fastddp
