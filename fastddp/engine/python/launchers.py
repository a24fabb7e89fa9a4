"""How a full bucket is sent: by an all-reduce, or by a communication hook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

import torch
from torch.distributed.distributed_c10d import AllreduceOptions

from fastddp.comm.labels import labelled
from fastddp.comm.loans import without_context
from fastddp.engine.hooks import BucketRunner, Wait
from fastddp.engine.python.bucket import Bucket, Form, LooseFlags
from fastddp.engine.python.context import Context
from fastddp.watch.events import Kind


@dataclass(frozen=True, slots=True)
class Launch:
    """A collective of a round that is under way."""

    bucket: Bucket
    """What it reduces: a bucket of the plan, a sparse gradient or the loose flags."""
    wait: Wait


class Launcher(Protocol):
    """How buckets, sparse gradients and the loose flags are sent."""

    form: Form
    """How buckets have to be laid out for this launcher."""
    may_launch_late: bool
    """Whether it may be as fast to launch all buckets at the end of backward.

    Then the first rounds try both.
    """

    def scale(self, divisor: float, /) -> float:
        """Returns what gradients are multiplied by on their way into a bucket."""

    def start(self, bucket: Bucket, waits: bool, /) -> Launch:
        """Sends a bucket of the plan or a sparse gradient, which the result overwrites.

        Args:
            bucket: the bucket, which nobody touches until the launch has been waited for.
            waits: whether the caller does nothing else until the result is there.
        """

    def end_buckets(self, launches: Sequence[Launch]) -> list[Launch]:
        """Called once all of these are sent; returns the ones that are still to be waited for."""

    def start_flags(self, flags: LooseFlags) -> Launch:
        """Sends the loose flags, after everything else."""

    def let_go(self) -> None:
        """Keeps no reference to buckets that have been waited for."""


class AllReduceLauncher:
    """Adds buckets up over the ranks of a group.

    Args:
        context: the facts that all parts of the reducer share.
        comm_dtype: the dtype that gradients are cast to for the all-reduce; None for no cast.
        may_launch_late: whether late launches may be as fast, see :class:`Launcher`.
    """

    def __init__(
        self, context: Context, comm_dtype: torch.dtype | None, *, may_launch_late: bool
    ) -> None:
        self.form = Form(packs=False, comm_dtype=comm_dtype)
        self.may_launch_late = may_launch_late
        self._context = context

    def scale(self, divisor: float, /) -> float:
        """See :class:`Launcher`. Division happens once, here."""
        return 1.0 / divisor

    def start(self, bucket: Bucket, waits: bool, /) -> Launch:
        """See :class:`Launcher`."""
        options = AllreduceOptions()
        options.asyncOp = not waits
        try:
            with without_context(), labelled(self._context.number, bucket.collective.number + 1):
                work = self._context.group().allreduce([bucket.sent()], options)
        except torch.distributed.DistBackendError as error:  # it has been waited for already
            return Launch(bucket, partial(_raise, error))

        number = bucket.collective.number
        what = "the all-reduce of gradients"
        return Launch(bucket, partial(self._context.wait_for, work, what, number))

    def end_buckets(self, launches: Sequence[Launch]) -> list[Launch]:
        """See :class:`Launcher`."""
        return list(launches)

    def start_flags(self, flags: LooseFlags) -> Launch:
        """See :class:`Launcher`."""
        return self.start(flags, False)

    def let_go(self) -> None:
        """See :class:`Launcher`. This launcher keeps no reference."""


class HookLauncher:
    """Hands buckets to a communication hook, with gradients that are not divided by anything.

    Args:
        hook: the hook that communicates the buckets.
        context: the facts that all parts of the reducer share.
        for_flags: the launcher of the flags, which a hook is not given.
    """

    form = Form(packs=True, comm_dtype=None)
    may_launch_late = False

    def __init__(self, hook: BucketRunner, context: Context, for_flags: AllReduceLauncher) -> None:
        self.hook = hook
        self._context = context
        self._for_flags = for_flags

    def scale(self, _: float, /) -> float:
        """See :class:`Launcher`."""
        return 1.0

    def start(self, bucket: Bucket, _: bool, /) -> Launch:
        """See :class:`Launcher`. A hook cannot be told that its caller waits."""
        with labelled(self._context.number, bucket.collective.number + 1):
            return Launch(bucket, self.hook.start(bucket.for_hook()))

    def end_buckets(self, launches: Sequence[Launch]) -> list[Launch]:
        """Waits for all: collectives that a hook's callbacks launch come before what is next.

        See :class:`fastddp.engine.hooks.HookRunner`.
        """
        for launch in launches:
            self._context.record(Kind.WAIT_BEGIN, launch.bucket.collective.number)
            launch.wait()
            self._context.record(Kind.WAIT_END, launch.bucket.collective.number)
        return []

    def start_flags(self, flags: LooseFlags) -> Launch:
        """See :class:`Launcher`."""
        return self._for_flags.start_flags(flags)

    def let_go(self) -> None:
        """See :class:`Launcher`."""
        self.hook.let_go()


def _raise(error: BaseException) -> NoReturn:
    raise error
