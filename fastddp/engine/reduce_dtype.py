"""Averaging gradients in another dtype than their own."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup, Work

from fastddp.comm.loans import Loan, settle, without_context
from fastddp.comm.patience import way_to_wait
from fastddp.device.streams import home_of, keep_for_current
from fastddp.engine.hooks import GradBucket, Wait
from fastddp.engine.weak_group import WeakGroup
from fastddp.watch.slow_wait import What


class ReduceInDtype:
    """Casts each bucket, all-reduces it, divides it by the number of ranks and casts it back.

    In this order, which is that of torch's mixed precision: a sum that float16 cannot hold becomes
    infinite, and the code that scales the loss sees it.

    Args:
        dtype: the floating-point dtype in which gradients are added up.
        group: the ranks that reduce; not kept alive.
    """

    def __init__(self, dtype: torch.dtype, group: ProcessGroup) -> None:
        self._dtype = dtype
        self._group = WeakGroup(group)
        # By bucket, of the round that is under way or was abandoned. A work refers to its tensor,
        # so it has to be gone before the loan can be settled.
        self._works: dict[int, Work] = {}
        self._loans: dict[int, Loan] = {}

    def __del__(self) -> None:
        self._works.clear()
        settle(self._loans.values())

    def start(self, bucket: GradBucket) -> Wait:
        """See :class:`fastddp.engine.hooks.BucketRunner`.

        Raises:
            RuntimeError: if the script has destroyed the group.
            torch.distributed.DistBackendError: if the collective fails; also the returned function.
        """
        group, index, gradients = self._group(), bucket.index(), bucket.buffer()
        self._settle(index)
        rank, num_ranks = group.rank(), group.size()
        sent = gradients.to(self._dtype)
        home = home_of(sent.device)
        wait_for = way_to_wait(group, sent.device)
        what = What(f"the all-reduce of bucket {index + 1} in {self._dtype}")
        self._loans[index] = Loan(sent)
        with without_context():
            self._works[index] = group.allreduce([sent])

        def wait() -> None:
            try:
                wait_for(self._works[index], what)
            except RuntimeError as error:
                first = bucket.parameters()[0]
                raise torch.distributed.DistBackendError(
                    f"fastddp: rank {rank}: the all-reduce of bucket {index + 1} in {self._dtype}"
                    f" failed (its first parameter has shape {tuple(first.shape)}): {error}"
                ) from error
            with torch.no_grad():
                torch.div(sent, num_ranks, out=gradients)  # rounded to the dtype of `sent` first
            keep_for_current([sent], home)
            self._settle(index)

        return wait

    def let_go(self) -> None:
        """Does nothing: what is sent is a copy, and gone once it was waited for."""

    def _settle(self, index: int) -> None:
        self._works.pop(index, None)
        loan = self._loans.pop(index, None)
        if loan is not None:
            settle([loan])
