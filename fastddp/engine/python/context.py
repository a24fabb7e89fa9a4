"""What the parts of one reducer have in common, for as long as it lives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import Work

from fastddp.comm.labels import WHOLE
from fastddp.comm.patience import WayToWait
from fastddp.engine.weak_group import WeakGroup
from fastddp.watch import events
from fastddp.watch.events import Kind
from fastddp.watch.slow_wait import What


@dataclass(frozen=True, slots=True)
class Context:
    """Where a reducer works, and for which model."""

    group: WeakGroup
    """The ranks that reduce."""
    rank: int
    """This rank's number, for messages."""
    device: torch.device
    """The device of the parameters."""
    number: int
    """The model's number, which labels the collectives."""
    title: str
    """What messages call the model."""
    group_id: int
    """What the group is called on the board, see :func:`fastddp.watch.layout.id_of`."""
    way_to_wait: WayToWait

    def wait_for(self, work: Work, text: str, number: int | None = None) -> None:
        """Waits for a collective of the group, see :func:`fastddp.comm.patience.wait_for`.

        Args:
            work: the collective that is under way.
            text: the name of the collective, for messages.
            number: the number of the bucket that it is for; None for no bucket.
        """
        label = self.number << 32 | (WHOLE if number is None else number + 1)
        self.way_to_wait(work, What(text, self.group_id, label))

    def record(self, kind: Kind, a: int = 0, b: int = 0) -> None:
        """Records an event of this model, see :func:`fastddp.watch.events.record`."""
        events.record(kind, self.number, a, b)
