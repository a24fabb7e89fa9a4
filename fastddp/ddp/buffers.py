"""A module's buffers, kept equal on all ranks: by broadcast, or by a hook of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp.comm.collectives import BroadcastBuffer
from fastddp.ddp.agreement import check_layout, ignored_names


@dataclass(frozen=True, slots=True)
class BufferHook:
    """What is done with the buffers in place of a broadcast."""

    hook: Callable[[Any, Mapping[str, torch.Tensor]], Any]
    """Called with the state and the buffers by name. May return futures, which are waited for at
    the end of backward."""
    state: Any
    before_forward: bool
    """Else after it."""


class Buffers:
    """The buffers of a module, but for those that it asks data parallelism to ignore.

    Args:
        module: whose.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._packed: BroadcastBuffer | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """Returns the buffers of now: modules replace theirs by assignment."""
        ignored = ignored_names(self._module)
        return {name: b for name, b in self._module.named_buffers() if name not in ignored}

    def broadcast(
        self, named: Mapping[str, torch.Tensor], group: ProcessGroup, root: int = 0
    ) -> None:
        """Gives every rank the values of rank ``root`` of the group. One collective; waits.

        Of any strides, also other ones on each rank.

        Raises:
            ValueError: if a buffer is none that can be sent; names it.
        """
        buffers = list(named.values())
        if self._packed is None or not self._packed.serves(buffers):
            for name, buffer in named.items():
                check_layout("buffer", name, buffer)
            self._packed = BroadcastBuffer(buffers)
        self._packed.broadcast(group, root)
