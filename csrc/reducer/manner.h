// How a round goes, which is decided when it begins.
#pragma once

namespace fastddp {

// What this rank adds to a round.
enum class Gives {
  kBackward,     // the gradients of a backward
  kWhatIsThere,  // what is in `.grad`, wherever it comes from
  kNothing,      // nothing: the round is that of the other ranks
};

struct Manner {
  Gives gives = Gives::kBackward;
  bool is_manual = false;    // finalize() ends the round, not the end of the backward
  bool is_captured = false;  // the round is recorded into a graph
  bool is_early = true;      // buckets are launched as they fill
  // Whether it is known how many gradients a parameter gets in one backward. Re-entrant checkpoints
  // that share it bring several, and only the end of the first round tells, so that round launches
  // nothing before its end. When to launch is this rank's own decision, so it is made by what this
  // rank has seen.
  bool knows_counts = false;
  bool is_followed = false;  // there are collectives to launch after the buckets
  double scale = 1;          // the factor for each gradient on the way into its bucket
};

}  // namespace fastddp
