#include "reducer/refusals.h"

#include <ATen/ATen.h>

namespace fastddp::refusals {

void backward_in(Phase phase, const Context& context, const std::string& what) {
  TORCH_CHECK(phase != Phase::kInFlight, "fastddp: rank ", context.rank(), ": ", what,
              " while the gradients of the backward before are in flight; call "
              "finalize_backward() before the next backward");
  TORCH_CHECK(false, "fastddp: rank ", context.rank(), ": ", what,
              " after finalize_backward() was called in the same backward; call it from where all "
              "of the model's gradients are there, or after backward");
}

void backward_before_agreement(const Context& context) {
  TORCH_CHECK(false, "fastddp: rank ", context.rank(), ": ", context.owner.title,
              " has changed on a rank, and the others wait for this one to compare theirs, "
              "since its latest backward has raised; run a forward in grad mode before the "
              "next backward");
}

void capture_too_early(const Context& context) {
  TORCH_CHECK(false, "fastddp: rank ", context.rank(),
              ": a graph is being captured in one of the first two synchronised backwards of this "
              "model, or the first after one that raised; run it two times before the capture");
}

void capture_of_lazy_buckets(const Context& context) {
  TORCH_CHECK(
      false, "fastddp: rank ", context.rank(),
      ": a graph would go on to write to buckets that lazy_bucket_allocation=True leaves to "
      "the script; wrap the model without it");
}

void finalization_of_nothing(const Context& context) {
  TORCH_CHECK(false, "fastddp: rank ", context.rank(),
              ": finalize_backward(), but no gradients are in flight; call it once for each "
              "synchronised backward that began with require_manual_backward_finalization = True");
}

void finalization_in_another_graph(const Context& context) {
  TORCH_CHECK(false, "fastddp: rank ", context.rank(),
              ": finalize_backward() has to be captured into the graph that its backward was "
              "captured into; call it within the same capture");
}

void finalization_out_of_turn(const Context& context, const std::string& others) {
  TORCH_CHECK(
      false, "fastddp: rank ", context.rank(), ": finalize_backward() of ", context.owner.title,
      " in the middle of a backward that reached another model on the same group before (", others,
      "), which still has gradients to send; finalize that one first, or call this when "
      "backward is over");
}

void finalization_of_another_layout(const Context& context, const Parameter& param) {
  const Layout& layout = param.layout;
  TORCH_CHECK(false, "fastddp: rank ", context.rank(), ": parameter '", param.name, "' had shape ",
              at::IntArrayRef(layout.sizes), " and dtype ",
              c10::typeMetaToScalarType(layout.options.dtype()), " in backward, and has ",
              param.variable.sizes(), " and ", param.variable.scalar_type(),
              " now that its gradient is to be written; call finalize_backward() before the "
              "model is changed. This backward's gradients are dropped");
}

void flags_of_a_round_under_way(const Context& context) {
  TORCH_CHECK(false, "fastddp: rank ", context.rank(),
              ": which parameters were used is known when the backward that is under way is over, "
              "and finalized");
}

}  // namespace fastddp::refusals
