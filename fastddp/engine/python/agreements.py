"""What the ranks agree on between two rounds: from the end of one to the head of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import Work

from fastddp.comm.labels import labelled
from fastddp.comm.loans import without_context
from fastddp.engine.python.context import Context
from fastddp.engine.schedule import Schedule


class Agreements:
    """The order in which gradients arrive, and when full buckets are launched.

    A collective that starts at the end of a round is waited for when the next round begins, so that
    no rank waits for it at the end.

    Args:
        context: the facts that all parts of the reducer share.
    """

    def __init__(self, context: Context) -> None:
        self.schedule = Schedule()
        self.order_is_learned = False
        self._context = context
        self._order: tuple[torch.Tensor, Work] | None = None
        self._timing: tuple[torch.Tensor, Work] | None = None

    @property
    def is_order_under_way(self) -> bool:
        """Whether the next round gets another plan."""
        return self._order is not None

    def start_with_order(self, order: Sequence[int]) -> None:
        """Starts to send rank 0's order of arrival to all ranks, for the next round's plan."""
        tensor = torch.tensor(order, device=self._context.device)
        with without_context(), labelled(self._context.number):
            self._order = tensor, self._context.group().broadcast([tensor])
        self.order_is_learned = True

    def start_with_schedule(self) -> None:
        """Starts to add up the ranks' times; the next round begins with what they decide."""
        best = [self.schedule.early_us, self.schedule.late_us]
        times = torch.tensor(best, dtype=torch.float64)
        with without_context(), labelled(self._context.number):
            self._timing = times, self._context.group().allreduce([times])

    def await_order(self) -> list[int] | None:
        """Returns rank 0's order of arrival, if it is under way."""
        if self._order is None:
            return None
        order = self._agreed(*self._order, "the broadcast of the order in which gradients arrive")
        self._order = None
        return order

    def await_schedule(self) -> None:
        """Has the schedule decide, if the ranks' times are under way."""
        if self._timing is None:
            return
        times = self._agreed(*self._timing, "the all-reduce of the times of rounds")
        self._timing = None
        self.schedule.decide(*times)

    def _agreed(self, tensor: torch.Tensor, work: Work, what: str) -> list[Any]:
        """Waits for an exchange. One that fails stays under way: no rank goes on without it."""
        try:
            self._context.wait_for(work, what)
        except RuntimeError as error:
            raise torch.distributed.DistBackendError(
                f"fastddp: rank {self._context.rank}: {what} failed: {error}"
            ) from error
        return tensor.tolist()
