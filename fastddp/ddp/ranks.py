"""The ranks that have a copy of one model, and the group through which they are reached."""

from __future__ import annotations

import weakref
from enum import Enum

import torch
from torch.distributed import ProcessGroup

from fastddp.comm import shm
from fastddp.comm.groups import timeout_of
from fastddp.comm.waiting import waiting


class Meets(Enum):
    """When the ranks may meet to share memory, which is collective."""

    NOW = "all ranks make this model at the same time"
    AT_FORWARD = "a copy: one rank may make it alone, and all of them run it"
    NEVER = "init_sync is off, and nothing says that all ranks wrap at the same time"


_LEGAL = {(Meets.NOW, Meets.AT_FORWARD), (Meets.AT_FORWARD, Meets.NOW)}


def is_alone(group: ProcessGroup | None) -> bool:
    """Returns whether a model in this group has nobody to be averaged with."""
    return group is None or group.size() == 1


class Ranks:
    """The ranks of one model. A model that moves to another group gets another one of these.

    Args:
        group: the ranks that have a copy of the model, or None for a world of one process.
        meets: whether the ranks may meet yet.
    """

    def __init__(self, group: ProcessGroup | None, meets: Meets) -> None:
        # Weak: the code that frees a process group last joins its threads, and must not hold the
        # GIL then.
        self._group = weakref.ref(group) if group is not None else None
        self.alone = is_alone(group)
        """Whether the world is one process, and nothing is synchronised."""
        self.rank = 0 if group is None else group.rank()
        """This rank's number within the group."""
        self.meets = meets

    @property
    def group(self) -> ProcessGroup | None:
        """The group; None for a world of one process, and after the group was destroyed."""
        return self._group() if self._group is not None else None

    @property
    def live_group(self) -> ProcessGroup:
        """The group, where there must be one."""
        group = self.group
        assert group is not None
        return group

    def timeout_s(self, device: torch.device) -> float:
        """Returns how many seconds a collective on this device may take."""
        return timeout_of(self.live_group, device).total_seconds()

    def move(self, to: Meets) -> None:
        """Changes when the ranks may meet.

        Raises:
            RuntimeError: if there is no such change.
        """
        if (self.meets, to) not in _LEGAL:
            raise RuntimeError(f"fastddp: ranks that meet {self.meets.name} cannot meet {to.name}")
        self.meets = to

    def transport(self, group: ProcessGroup, device: torch.device) -> ProcessGroup:
        """Returns the group that gradients and buffers go through.

        Collective at the first call for a group, if the ranks may meet now: to make a counterpart
        on shared memory all of them have to.

        Args:
            group: the ranks' own group, alive.
            device: the device that the model is on.
        """
        if self.meets is Meets.NEVER:
            return group
        if not shm.has_to_meet(group, device):
            return shm.counterpart(group, device)
        if self.meets is Meets.AT_FORWARD:
            return group
        with waiting(group, "wrapping a model: the connection of the ranks' memory"):
            return shm.counterpart(group, device)
