"""What the rest of the package knows of a reducer, of whichever engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastddp.engine.hooks import BucketRunner
from fastddp.engine.news import News
from fastddp.engine.plan import BucketPlan
from fastddp.engine.stats import Stats


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that a reducer serves.

    The parameters, and their order, are the same on every rank.
    """

    params: Sequence[torch.nn.Parameter]
    """The parameters to hook, all on one device.

    Each is floating point or complex and requires grad, at least now and then.
    """
    names: Sequence[str]
    """What messages call these parameters."""
    num_sparse: int
    """How many of the last parameters get sparse gradients, with one dimension of indices."""
    frozen: Sequence[torch.Tensor]
    """The model's other parameters, see :meth:`Reducer.outgrown`."""
    number: int = 0
    """32 bits that tell this model's collectives from another model's on the same group."""
    title: str = "the model"
    """What messages call the model."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a reducer averages gradients."""

    caps_bytes: Sequence[int]
    """The sizes of buckets, see :func:`fastddp.engine.plan.plan_buckets`; equal on every rank."""
    comm_dtype: torch.dtype | None = None
    """The dtype that gradients are cast to for the all-reduce, but for float64 ones.

    None for the dtypes that they have. The same on every rank.
    """
    lazy: bool = False
    """Whether a bucket is allocated when the first gradient arrives, and left to the script.

    It is left at the end of the round. Ranks may differ.
    """


class Reducer(Protocol):
    """Averages gradients; made by :func:`make_reducer`, owned by one wrapped module."""

    sync: bool
    """Whether a backward that begins now is synchronised. Read when backward begins."""

    manual: bool
    """Whether the round of a backward that begins now ends with :meth:`finalize`.

    Otherwise it ends with its backward. Read when backward begins.
    """

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        """Takes note of the tensors that a forward in grad mode has returned; called after each.

        A backward that goes through one of them is a round on every rank, also on a rank where it
        then reaches no parameter.
        """

    def set_divisor(self, divisor: float) -> None:
        """Sets the number that gradients are divided by from the next round on.

        Without this call, that is the number of ranks."""

    def set_hook(self, hook: BucketRunner) -> None:
        """Hands the buckets to a communication hook, or the like, in place of the all-reduce.

        To be called on every rank; takes effect with the next round. Buckets then hold gradients
        that are not divided by anything, without gaps, and with rows in order whatever the strides
        of the parameter. A sparse gradient is a bucket of its own.
        """

    def set_after_round(self, callback: Callable[[], None] | None) -> None:
        """Has ``callback`` called at the end of each round, once gradients are in ``.grad``.

        The reducer keeps the callback alive, so it should refer to the reducer's owner weakly.
        """

    def set_on_news(self, callback: Callable[[News], None]) -> None:
        """Has ``callback`` called when a round brought news, which it does on all ranks.

        An exception of the callback comes out of the backward.
        """

    @property
    def has_left_news(self) -> bool:
        """Whether the latest round may have brought news that nobody has read.

        That is so after a backward that raised. Another backward refuses to begin until then.
        """

    @property
    def began_ns(self) -> int:
        """The time at which the latest round began, in nanoseconds since the epoch."""

    @property
    def rounds(self) -> int:
        """The number of rounds that have ended well, as in :class:`Stats`."""

    def read_left_news(self) -> bool:
        """Returns whether that round brought the news that the model of a rank has changed.

        Waits until the collectives of the round have ended. The next call returns False.
        """

    def leave_news(self) -> None:
        """Has the next :meth:`read_left_news` return True."""

    def outgrown(self) -> bool:
        """Returns whether a frozen parameter requires grad by now, see :meth:`retire`."""

    def is_stale(self) -> bool:
        """Returns whether a parameter has changed since it was hooked, see :meth:`retire`.

        It may have another shape, layout, dtype, device or gradient node. To be called before a
        forward, since the graph would have nodes that are not hooked. When a round begins and
        nobody has called this since the round before, the reducer calls it.
        """

    def retire(self) -> None:
        """Leaves the parameters alone, since the model has changed, and tells the other ranks so.

        The news travel with the next round, to which this rank adds nothing. ``.grad`` stays as it
        is, so that the next reducer can :meth:`average` it.
        """

    def is_in_flight(self) -> bool:
        """Returns whether a manual round waits for :meth:`finalize`; its backward is over."""

    def finalize(self) -> None:
        """Waits for the manual round's collectives and writes its gradients to ``.grad``.

        When called while the backward still runs, it first launches the buckets that are left. No
        further gradient may come in that backward.

        Raises:
            RuntimeError: if there is no such round, or it may not be ended yet; then the round
                stays. If a parameter has changed since backward; then the round is dropped.
            torch.distributed.DistBackendError: if a collective has failed.
        """

    def average(self) -> None:
        """Averages what is in ``.grad``, wherever it comes from. Called on all ranks together."""

    def settle(self) -> bool:
        """Waits for another thread to end a round after its backward has raised.

        On a GPU, autograd has threads of its own, and what is communicated next has to come after
        that round. Returns whether the round is over. After 10 s it gives up, since the thread may
        run a long backward just as well.
        """

    def shadow(self) -> None:
        """Takes part in a round of the other ranks with nothing to add; returns when it is over.

        The gradients are then those of the other ranks, for optimizers that take part too.
        """

    def unused(self) -> Sequence[str]:
        """Returns the names of the parameters that no rank had a gradient for in round one."""

    def error(self) -> str:
        """Returns the text of the engine's latest error in a backward; empty if there was none."""

    def used_by(self) -> Sequence[int]:
        """Returns, by parameter, how many ranks had a gradient for it in the latest round.

        Before the first round, that is the number of all ranks.

        Raises:
            RuntimeError: if a round is under way.
        """

    def close(self) -> None:
        """Unhooks the parameters, so that their next gradients are left alone.

        To be called once, at any time."""

    def stats(self) -> Stats:
        """Returns a snapshot of the figures; may be called at any time."""

    def plan(self) -> BucketPlan:
        """Returns the plan of the latest round, or of the first round if there was none yet."""
