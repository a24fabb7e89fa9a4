"""The begin of the recording of events, which says which rank of which host this process is."""

from __future__ import annotations

import torch.distributed as dist

from fastddp.comm.hosts import this_host
from fastddp.watch import events


def start_recording(rank: int, world_size: int) -> None:
    """Begins to record events, if this process does not yet; see :mod:`fastddp.watch.events`.

    Args:
        rank: the rank, if there is no default group; it is made in this moment, or there is none.
        world_size: the number of ranks, likewise.
    """
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        host = this_host()
    except OSError:
        host = None
    events.start(rank, world_size, host)
