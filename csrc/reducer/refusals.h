// What a reducer refuses to do, in words for whoever runs into it.
#pragma once

#include <string>

#include "core/phase.h"
#include "reducer/context.h"
#include "reducer/parameters.h"

namespace fastddp::refusals {

// Refuses a gradient that comes while those of a manual round are in flight, or written. `what` is
// the event, as a clause.
[[noreturn]] void backward_in(Phase phase, const Context& context, const std::string& what);
// Refuses a backward while the other ranks wait to compare models.
[[noreturn]] void backward_before_agreement(const Context& context);
// Refuses to record a round that would allocate, or wait for the host: a graph cannot.
[[noreturn]] void capture_too_early(const Context& context);
// Refuses to record writes to memory that is going to be the script's.
[[noreturn]] void capture_of_lazy_buckets(const Context& context);
// Refuses finalize_backward() where no manual round is under way.
[[noreturn]] void finalization_of_nothing(const Context& context);
// Refuses to end a round inside a capture that it did not begin in, or the reverse.
[[noreturn]] void finalization_in_another_graph(const Context& context);
// Refuses to launch buckets before those of a round that began earlier on the same group. `others`
// are the titles of the other models there.
[[noreturn]] void finalization_out_of_turn(const Context& context, const std::string& others);
// Refuses to write gradients to a parameter that has been changed since backward.
[[noreturn]] void finalization_of_another_layout(const Context& context, const Parameter& param);
// Refuses to say which parameters were used while that is not known.
[[noreturn]] void flags_of_a_round_under_way(const Context& context);

}  // namespace fastddp::refusals
