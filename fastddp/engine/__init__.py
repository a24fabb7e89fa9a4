"""The interface of a reducer, and the choice between the two that there are.

A reducer averages gradients over the ranks of a process group while backward runs. ``native`` is
the C++ one (``csrc/torch/reducer.cpp``); ``python`` is plain torch, the specification of the other
and its stand-in where there is no compiler. Both give the same bits and may be mixed in one job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from fastddp import config, extension
from fastddp.hooks import BucketRunner
from fastddp.plan import BucketPlan

NAMES = ("native", "python")


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


class Reducer(Protocol):
    """Averages gradients; made by :func:`make_reducer`, owned by one wrapped module."""

    sync: bool
    """Whether a backward that begins now is synchronised. Read when backward begins."""

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

    def outgrown(self) -> bool:
        """Returns whether a parameter that was frozen requires grad now.

        Then another reducer is needed, on every rank before its next backward.
        """

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

    def close(self) -> None:
        """Unhooks the parameters. Their next gradients are left alone; call once, at any time."""

    def stats(self) -> Stats:
        """Returns a snapshot; may be called at any time."""

    def plan(self) -> BucketPlan:
        """Returns the plan of the latest round, or of the first one to come."""


def choose(requested: str | None = None) -> str:
    """Returns the name of the engine to use: ``native`` or ``python``.

    Args:
        requested: a name, or None for ``FASTDDP_ENGINE`` if set, else the fastest that works here.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if ``native`` is asked for and the extension cannot be used; says why.
    """
    name = requested or config.engine()
    if name not in (None, *NAMES):
        raise ValueError(f"engine={name!r} is not one of {', '.join(NAMES)}")
    if name == "python":
        return name
    if extension.load() is not None:
        return "native"
    if name == "native":
        raise RuntimeError(f"fastddp: the native engine was asked for, but {extension.why_not()}")
    extension.warn_once()
    return "python"


def make_reducer(
    name: str,
    params: Sequence[torch.nn.Parameter],
    names: Sequence[str],
    num_sparse: int,
    frozen: Sequence[torch.Tensor],
    group: ProcessGroup,
    caps_bytes: Sequence[int],
    comm_dtype: torch.dtype | None = None,
) -> Reducer:
    """Hooks ``params`` and returns their reducer.

    Args:
        name: the engine, from :func:`choose`.
        params: each is floating point or complex and requires grad, at least now and then; all on
            one device. The same ones, in the same order, on every rank.
        names: theirs, for messages.
        num_sparse: how many of the last of them get sparse gradients, with one index dimension.
        frozen: the model's other parameters, see :meth:`Reducer.outgrown`.
        group: where to reduce. The reducer does not keep it alive.
        caps_bytes: see :func:`fastddp.plan.plan_buckets`; the same on every rank.
        comm_dtype: what gradients are cast to for the all-reduce, but for float64 ones; None for
            what they are. The same on every rank.
    """
    if name == "native":
        from fastddp.engine.native import NativeReducer

        return NativeReducer(params, names, num_sparse, frozen, group, caps_bytes, comm_dtype)
    from fastddp.engine.python import PythonReducer

    return PythonReducer(params, names, num_sparse, frozen, group, caps_bytes, comm_dtype)
