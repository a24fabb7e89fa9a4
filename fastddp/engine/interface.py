"""What the rest of the package knows of a reducer, whichever engine it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fastddp.engine.hooks import BucketRunner
from fastddp.engine.news import News
from fastddp.engine.plan import BucketPlan


class Stats(Protocol):
    """Figures of the synchronised backwards so far, as this rank's host saw them."""

    @property
    def rounds(self) -> int:
        """Synchronised backwards."""

    @property
    def wait_us_total(self) -> float:
        """Microseconds spent at the ends of backwards until the last bucket was reduced.

        This is the communication that was not hidden. For collectives on a GPU the host does not
        wait, so nothing is counted.
        """

    @property
    def wait_us_last(self) -> float:
        """The same for the latest of them."""

    @property
    def bytes_per_round(self) -> int:
        """Bytes that go into collectives; 0 before the first round."""

    @property
    def num_buckets(self) -> int:
        """Buckets, which are collectives, per round; 0 before the first round."""

    @property
    def overlaps(self) -> bool:
        """Whether the latest round launched buckets while backward went on, or all at its end.

        On the shared-memory backend the first rounds try both, and the faster stays.
        """

    @property
    def began_ns(self) -> int:
        """When the latest round began, in nanoseconds since the epoch."""

    @property
    def backward_us_last(self) -> float:
        """Microseconds from the beginning of the latest round until its backward was through."""

    @property
    def comm_us_last(self) -> float:
        """Microseconds from its first collective until its last bucket was reduced."""

    @property
    def unused_bytes_last(self) -> int:
        """Bytes of the parameters that this rank had no gradient for in it."""

    @property
    def is_static(self) -> bool:
        """Whether these have been the same parameters in every round."""


class Reducer(Protocol):
    """Averages gradients; made by :func:`make_reducer`, owned by one wrapped module."""

    sync: bool
    """Whether a backward that begins now is synchronised. Read when backward begins."""

    manual: bool
    """Whether the round of a backward that begins now ends with :meth:`finalize`.

    Else with its backward. Read when backward begins.
    """

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        """Takes note of what a forward has returned, after each, in grad mode.

        A backward that goes through one of them is a round on every rank, also on one where it
        then reaches no parameter.
        """

    def set_divisor(self, divisor: float) -> None:
        """Sets what gradients are divided by, from the next round on; else the number of ranks."""

    def set_hook(self, hook: BucketRunner) -> None:
        """Hands the buckets to a communication hook, or the like, in place of the all-reduce.

        From the next round on, on every rank. Buckets then hold gradients as they are, without
        gaps, and with rows in order whatever the parameter's strides; a sparse gradient comes as a
        bucket of its own.
        """

    def set_after_round(self, callback: Callable[[], None] | None) -> None:
        """Has ``callback`` called at the end of each round, once gradients are where they belong.

        The reducer holds it; let it refer to the reducer's owner weakly.
        """

    def set_on_news(self, callback: Callable[[News], None]) -> None:
        """Has ``callback`` called when a round brought news, on all ranks alike.

        What it raises comes out of the backward.
        """

    @property
    def has_left_news(self) -> bool:
        """Whether the latest round may have brought news that nobody has answered.

        For its backward has raised. Another one refuses to begin while there are such.
        """

    @property
    def began_ns(self) -> int:
        """When the latest round began, in nanoseconds since the epoch."""

    def read_left_news(self) -> bool:
        """Returns whether that round brought the news that the model of a rank has changed.

        Waits until the round's collectives have ended. Once only; then nothing is left.
        """

    def leave_news(self) -> None:
        """Has the next :meth:`read_left_news` say so."""

    def outgrown(self) -> bool:
        """Returns whether a parameter that was frozen requires grad now, see :meth:`retire`."""

    def is_stale(self) -> bool:
        """Returns whether a parameter has another shape, layout, dtype, device or gradient node.

        Than it had when it was hooked, see :meth:`retire`. To be asked before a forward, whose
        graph would have nodes that do not fit. A round asks too, if nobody has since the last.
        """

    def retire(self) -> None:
        """Leaves the parameters alone, for the model has changed, and tells the other ranks so.

        The news travel with the next round, to which this rank has nothing to add; ``.grad`` is
        left as it is, for the reducer that comes after this one to :meth:`average`.
        """

    def is_in_flight(self) -> bool:
        """Returns whether a manual round waits for :meth:`finalize`; its backward is over."""

    def finalize(self) -> None:
        """Waits for the manual round's collectives and writes its gradients to ``.grad``.

        Called while its backward still runs, it first launches what is left: no further gradient
        may come in that backward.

        Raises:
            RuntimeError: if there is no such round, or not yet one that may be ended; the round
                stays then. If a parameter has become another since backward.
            torch.distributed.DistBackendError: if a collective has failed.
        """

    def average(self) -> None:
        """Averages what is in ``.grad``, wherever it comes from. Collective."""

    def settle(self) -> bool:
        """Waits for another thread to end a round that its backward has left by an exception.

        On a GPU, where autograd has threads of its own; for whoever communicates next. Returns
        whether it is over; after 10 s it gives up, for a thread may as well run a long backward.
        """

    def shadow(self) -> None:
        """Takes part in a round of the other ranks with nothing to add; returns when it is over.

        Gradients are then those of the other ranks, for optimizers that join too.
        """

    def unused(self) -> Sequence[str]:
        """Returns the names of the parameters that no rank had a gradient for in round one."""

    def error(self) -> str:
        """Returns what the latest error of the engine in a backward said; empty for none."""

    def used_by(self) -> Sequence[int]:
        """Returns, by parameter, how many ranks had a gradient for it in the latest round.

        All of them before the first.

        Raises:
            RuntimeError: in a round, until it is finalized.
        """

    def close(self) -> None:
        """Unhooks the parameters. Their next gradients are left alone; call once, at any time."""

    def stats(self) -> Stats:
        """Returns a snapshot; may be called at any time."""

    def plan(self) -> BucketPlan:
        """Returns the plan of the latest round, or of the first one to come."""
