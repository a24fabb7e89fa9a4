"""The Python engine: the reducer's specification, in plain torch.

One synchronised backward is a *round*. This is the life of one:

* It begins: ``PythonReducer._begin_round`` installs the plan if a new one is due, and autograd is
  asked to call back at the end of this backward.
* A gradient arrives: ``Round.take`` copies it to its place in a bucket and scales it on the way,
  empties ``.grad`` and launches the buckets that are full, in plan order.
* Backward ends: ``PythonReducer._finish_round`` launches the buckets that are left, waits for all
  of them, and makes each ``.grad`` the reduced slot.
* Backward raises: ``_abandon_round`` launches the buckets that are left and waits for nothing but
  hooks.
* The round is a manual one: the end of backward launches the buckets that are left and leaves them
  in flight. ``finalize``, which the script calls, does the rest. If the script calls it before
  backward is over, it does everything.

A round begins when backward reaches an output of forward, or at the first gradient if there is no
such output. Outputs are the same on every rank, whatever parameters the backward goes on to reach,
and they lie outside of any re-entrant backward.

Every rank launches every bucket in every round, also buckets for which it has no gradient, then
every sparse gradient, then the flags that travel in no bucket. So ranks stay in step when they use
different parameters or when one of them raises. ``.grad`` is empty while the bucket is in flight,
so nothing but the collective can touch a launched bucket.

``.grad`` becomes an alias of the slot. The alias belongs to the script, which may do anything with
it, and the slot itself stays here. If the script still refers to the memory of a bucket when the
next round begins, other than by ``.grad``, the memory is left to the script, and the round uses new
memory. With lazy buckets, the memory of a bucket is allocated when the first gradient of the round
arrives, and is left to the script at the end of the round: then only the ``.grad``s refer to it.

Each bucket ends with marks (:mod:`fastddp.engine.marks`). They tell the ranks when they have added
up different buckets, and when the model of a rank has changed since it was wrapped. When a model
has changed, its reducer is *retired*: it takes part in rounds with nothing to add until another
reducer takes its place.

On a GPU, work on a bucket waits, by events, for the streams that have worked on it before. The host
waits for nothing but the flags of parameters for which this rank has no gradient. At the end of a
round, the stream that called backward has waited for all of this work.

Read the files in this order: ``reducer`` (what autograd and the wrapper call), ``round`` (one
backward), ``fill`` and ``places`` (how a gradient gets into a bucket), ``bucket`` and ``buckets``
(an installed plan), ``launchers`` (how a bucket is sent). ``csrc/reducer`` is the same in C++.
"""
