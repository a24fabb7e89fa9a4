"""What the launcher said about this process: its rank, the world, and where the ranks meet."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastddp import config
from fastddp.comm import launchers
from fastddp.comm.launchers import Place, number

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which torchrun says who the ranks are and where they meet."""
_WHAT_IT_IS = {
    "WORLD_SIZE": "the number of ranks",
    "MASTER_ADDR": "rank 0's host",
    "MASTER_PORT": "a free port there",
}
# If one of these shows a process one device only, it is that rank's.
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """Where ranks meet that were not told by torchrun's variables."""

    host: str
    port: int
    job: str
    """The name of the job, which keeps apart ranks of two jobs that came to the same port."""
    host_from: str | None
    """The variable that the host was derived from, or None if the user set the host."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The launcher's variables; None for a variable that is not set."""

    rank: int | None
    world_size: int | None
    local_rank: int | None
    launcher: str = "torchrun's variables"
    meeting: MeetingPoint | None = None
    """The meeting point; None where torch's own ``env://`` knows it."""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process as one of several ranks, or of one."""
        return self.rank is not None


def describe_environment() -> Environment:
    """Returns what the environment says: torchrun's variables, or else those of other launchers.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT win over those, also one by one.

    Raises:
        RuntimeError: if only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are known, or
            one is not a number as it should be; names them.
        ValueError: if FASTDDP_LAUNCHER is neither 0 nor 1.
    """
    place = None if all(name in os.environ for name in RENDEZVOUS) else _find_place()
    environment = _described_by(place) if place is not None else _described()
    rank, world_size = environment.rank, environment.world_size
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise RuntimeError(f"fastddp: RANK={rank} is not in 0 ... WORLD_SIZE-1={world_size - 1}")
    return environment


def find_local_rank() -> int | None:
    """Returns LOCAL_RANK or what another launcher calls it; None where nothing says it.

    Unlike :func:`describe_environment`, it asks for no rendezvous: the group may exist already.
    """
    local_rank = number("LOCAL_RANK", os.environ)
    if local_rank is not None:
        return local_rank
    place = _find_place()
    if place is None or not _is_this_process(place):
        return None
    return place.local_rank


def find_cuda_device(local_rank: int) -> int | None:
    """Returns the index of a rank's GPU among those that this process sees; None if there is none.

    Args:
        local_rank: the number of this rank among those of the host.
    """
    count = torch.cuda.device_count()
    if 0 <= local_rank < count:
        return local_rank
    return 0 if count == 1 and any(name in os.environ for name in _VISIBLE_DEVICES) else None


def _find_place() -> Place | None:
    return launchers.find() if config.launcher() else None


def _described() -> Environment:
    """Returns what torchrun's variables say, all of them or none."""
    # MASTER_ADDR and MASTER_PORT alone describe no rank: a script that spawns its own ranks often
    # exports them, and passes the rank to init_process_group itself.
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if ("RANK" in os.environ or "WORLD_SIZE" in os.environ) and missing:
        given = ", ".join(f"{n}={os.environ[n]}" for n in RENDEZVOUS if n in os.environ)
        raise RuntimeError(
            f"fastddp: the environment describes half a process group: {given}, but not"
            f" {', '.join(missing)}. Launch with torchrun, set all four, or call"
            " torch.distributed.init_process_group before wrap"
        )
    rank, world_size, local_rank = (
        number(name, os.environ) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    return Environment(rank, world_size, local_rank)


def _described_by(place: Place) -> Environment:
    """Returns what another launcher says, completed and overruled by torchrun's variables."""
    for name, value in (("RANK", place.rank), ("WORLD_SIZE", place.size)):
        if value is not None and number(name, os.environ) not in (None, value):
            raise RuntimeError(
                f"fastddp: {name}={os.environ[name]}, but {place.launcher}, which started this"
                f" process, says {value}. Set all of {', '.join(RENDEZVOUS)}, or leave {name} out"
            )
    port = number("MASTER_PORT", os.environ)
    size = number("WORLD_SIZE", os.environ) if place.size is None else place.size
    known = {
        "WORLD_SIZE": size,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", place.host),
        "MASTER_PORT": place.port if port is None else port,
    }
    missing = [name for name, value in known.items() if value is None]
    if missing:
        which = f"rank {place.rank}" if size is None else f"rank {place.rank} of {size}"
        looks = "MASTER_ADDR" in missing and place.host_from
        looked = f" (nothing in {place.host_from})" if looks else ""
        raise RuntimeError(
            f"fastddp: {place.launcher} started this process as {which}, but does not say"
            f" {', '.join(missing)}{looked}. Set"
            f" {', '.join(f'{name} to {_WHAT_IT_IS[name]}' for name in missing)}, the same on all"
            " ranks, or call torch.distributed.init_process_group before wrap"
        )
    if place.only_terminal:
        raise RuntimeError(
            f"fastddp: this is rank {place.rank} of {size} of 'srun --pty', whose other ranks have"
            " no terminal. Start the script itself by srun without --pty, or the shell with"
            " 'srun --ntasks 1 --pty', or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    local_rank = number("LOCAL_RANK", os.environ)
    meeting = MeetingPoint(
        host=str(known["MASTER_ADDR"]),
        port=int(str(known["MASTER_PORT"])),
        job=place.job or "",
        host_from=None if "MASTER_ADDR" in os.environ else place.host_from,
    )
    return Environment(
        rank=place.rank,
        world_size=size,
        local_rank=place.local_rank if local_rank is None else local_rank,
        launcher=place.launcher,
        meeting=meeting,
    )


def _is_this_process(place: Place) -> bool:
    """Whether what started this process started it as the rank that its group says it is.

    Not so where the launcher's one process has started ranks of its own, which inherit from it.
    """
    if not dist.is_available() or not dist.is_initialized():
        return True
    return (dist.get_rank(), dist.get_world_size()) == (place.rank, place.size)
