"""What the launcher said about this process, and the process group made from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Environment:
    """The launcher's variables, as torchrun sets them. None where one is not set."""

    rank: int | None
    world_size: int | None
    local_rank: int | None

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process as one of several ranks, or of one."""
        return self.rank is not None


def describe_environment() -> Environment:
    """Returns what the environment says.

    Raises:
        RuntimeError: if only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, or one
            is not the number it should be; names them.
    """
    # MASTER_ADDR and MASTER_PORT alone describe no rank: a script that spawns its own ranks often
    # exports them, and passes the rank to init_process_group itself.
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if ("RANK" in os.environ or "WORLD_SIZE" in os.environ) and missing:
        given = ", ".join(f"{n}={os.environ[n]}" for n in _RENDEZVOUS if n in os.environ)
        raise RuntimeError(
            f"fastddp: the environment describes half a process group: {given}, but not"
            f" {', '.join(missing)}. Launch with torchrun, set all four, or call"
            " torch.distributed.init_process_group before wrap"
        )
    environment = Environment(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK"))
    rank, world_size = environment.rank, environment.world_size
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise RuntimeError(f"fastddp: RANK={rank} is not in 0 ... WORLD_SIZE-1={world_size - 1}")
    return environment


def init_process_group(
    backend: str | None = None, timeout: timedelta | None = None, **options: Any
) -> None:
    """Makes the default process group: torch's function, with the fastest backend as default.

    Args:
        backend: None for NCCL on CUDA and shared memory on the CPU, or gloo where memory cannot be
            shared; ranks on several hosts share it within each.
        timeout: of collectives; None for torch's default.
        **options: see :func:`torch.distributed.init_process_group`. Without any, the launcher's
            environment says who the ranks are.
    """
    dist.init_process_group(backend or default_backend(), timeout=timeout, **options)


def default_backend() -> str:
    """Returns what :func:`init_process_group` takes unless told.

    The same on every rank, whatever this one can do: where one of them cannot share memory,
    ``shm`` is gloo on all.
    """
    return "cpu:shm,cuda:nccl" if torch.cuda.is_available() else "shm"


def ensure_process_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Returns the default process group, made from the environment if there is none yet.

    Args:
        timeout: of the collectives of a group that is made here; None for torch's default.

    Returns:
        None if there is neither a group nor an environment that describes one: a plain
        ``python script.py``, whose world is this process.
    """
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        environment = describe_environment()
        if not environment.launched:
            return None
        if torch.cuda.is_available() and environment.local_rank is not None:
            torch.cuda.set_device(environment.local_rank)
        init_process_group(timeout=timeout)
    return dist.group.WORLD


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise RuntimeError(f"fastddp: {name}={text!r} in the environment is no number") from None
