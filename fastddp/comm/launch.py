"""The default process group, made from what the launcher said about this process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastddp.comm.environment import describe_environment, find_cuda_device
from fastddp.comm.rendezvous import meet

# With one of these, the caller of init_process_group says it.
_SAYS_WHO = ("init_method", "store", "rank", "world_size")


def init_process_group(
    backend: str | None = None, timeout: timedelta | None = None, **options: Any
) -> None:
    """Makes the default process group: torch's function, with the fastest backend as default.

    Collective.

    Args:
        backend: the name of torch's backend. None for NCCL on CUDA and shared memory on the CPU, or
            gloo where memory cannot be shared; ranks on several hosts share it within each host.
        timeout: the time that a collective may take; None for torch's default.
        **options: further keywords of :func:`torch.distributed.init_process_group`. Without
            ``init_method``, ``store``, ``rank`` and ``world_size``, the launcher's environment says
            who the ranks are: torchrun's variables, or those of srun, mpirun and others
            (docs/launching.md).

    Raises:
        RuntimeError: if the environment says only half of that; names what is missing.
    """
    if all(options.get(name) in (None, -1) for name in _SAYS_WHO):
        environment = describe_environment()
        if environment.meeting is not None:
            options["store"] = meet(environment, timeout)
            options["rank"], options["world_size"] = environment.rank, environment.world_size
    dist.init_process_group(backend or default_backend(), timeout=timeout, **options)


def default_backend() -> str:
    """Returns the backend that :func:`init_process_group` takes unless it is told another one.

    The same on every rank, whatever this one can do: where one rank cannot share memory, ``shm`` is
    gloo on all of them.
    """
    return "cpu:shm,cuda:nccl" if torch.cuda.is_available() else "shm"


def ensure_process_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Returns the default process group, made from the environment if there is none yet.

    Collective then.

    Args:
        timeout: the time that a collective of a new group may take; None for torch's default.

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
            device = find_cuda_device(environment.local_rank)
            if device is not None:  # else the code that wants to use one gets the error
                torch.cuda.set_device(device)
        init_process_group(timeout=timeout)
    return dist.group.WORLD
