"""What the parts of one reducer have in common, for as long as it lives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastddp.engine.weak_group import WeakGroup
from fastddp.watch import events
from fastddp.watch.events import Kind


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

    def record(self, kind: Kind, a: int = 0, b: int = 0) -> None:
        """Records an event of this model, see :func:`fastddp.watch.events.record`."""
        events.record(kind, self.number, a, b)
