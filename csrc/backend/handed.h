// The collectives that the inner backend carries out, once the ranks have found that they mean the
// same: that backend compares nothing, and ends the process that gets more than it has room for.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/connections.h"
#include "backend/particulars.h"
#include "backend/plain.h"
#include "backend/starter.h"
#include "shm/collectives.h"
#include "shm/group.h"

namespace fastddp {

// One collective that is handed on.
struct HandedCall {
  c10d::OpType type;
  const char* title;
  shm::Kind kind;
  std::vector<at::Tensor> results;  // all that it writes to
  Particulars what;
  std::int64_t root = 0;
};

class HandedCollectives {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Work = c10::intrusive_ptr<c10d::Work>;
  // Calls the inner backend, with what stands in for the caller's tensors.
  using Call = std::function<Work(Stand&)>;
  template <typename Options>
  using InPlace = Work (c10d::Backend::*)(Tensors&, const Options&);
  template <typename Outputs, typename Inputs, typename Options>
  using Moving = Work (c10d::Backend::*)(Outputs&, Inputs&, const Options&);

  HandedCollectives(int rank,
                    int size,
                    Starter& starter,
                    Connections& connections,
                    std::shared_ptr<shm::Group> group,
                    shm::Collectives& collectives);

  template <typename Options>
  Work start(HandedCall call, const Options& options, Call launch) {
    return start(std::move(call), options.timeout, options.asyncOp, std::move(launch));
  }

  // By a method of the inner backend that works in place.
  template <typename Options>
  Work start(HandedCall call, const Options& options, InPlace<Options> method) {
    const Tensors tensors = call.results;
    return start(std::move(call), options, [this, tensors, options, method](Stand& stand) {
      Tensors plain = stand.update(tensors);
      return (connections_.inner().get()->*method)(plain, options);
    });
  }

  // Tensors or lists of them, by a method of the inner backend that reads some and writes others.
  template <typename Outputs, typename Inputs, typename Options>
  Work start(HandedCall call,
             const Outputs& outputs,
             const Inputs& inputs,
             const Options& options,
             Moving<Outputs, Inputs, Options> method) {
    return start(std::move(call), options, [this, outputs, inputs, options, method](Stand& stand) {
      Inputs plain = stand.read(inputs);
      Outputs plain_outputs = stand.write(outputs);
      return (connections_.inner().get()->*method)(plain_outputs, plain, options);
    });
  }

 private:
  Work start(HandedCall call, std::chrono::milliseconds timeout, bool async, Call launch);
  void compare(const HandedCall& call, shm::Deadline deadline);
  std::vector<std::string> exchange_across(const std::string& mine, shm::Deadline deadline);
  Work launch_together(const Call& launch, Stand& stand, shm::Deadline deadline);
  void wait_for(const Work& work, shm::Deadline deadline);
  bool spans_hosts() const { return static_cast<int>(group_->size()) != size_; }

  const int rank_;
  const int size_;
  Starter& starter_;
  Connections& connections_;
  const std::shared_ptr<shm::Group> group_;
  shm::Collectives& collectives_;
};

}  // namespace fastddp
