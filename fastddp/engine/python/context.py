"""What the parts of one reducer have in common, for as long as it lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import Work

from fastddp.engine.weak_group import WeakGroup


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
    wait_for: Callable[[Work], object]
    """Waits for a collective of the group, see :func:`fastddp.comm.patience.wait_for`."""
