"""Runs a function on N ranks, each a new process in one group: gloo over loopback, or NCCL."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common.namespaces import Host

COLLECTIVE_LIMIT = timedelta(seconds=120)


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    threads: int = 1,
    limit_s: float = 1800,
    hosts: Sequence[Host] = (),
    backend: str = "gloo",
) -> list[Any]:
    """Calls `function(*args)` on every rank and returns the results in rank order.

    An exception on any rank ends all of them and is raised here with that rank's traceback.

    Args:
        function: the function to call, which can be pickled.
        ranks: the number of processes.
        *args: the arguments of the function.
        threads: the number of torch's threads on each rank.
        limit_s: the time in seconds after which all ranks are killed.
        hosts: the hosts to spread the ranks over evenly, the first ranks on the first host; without
            hosts the ranks communicate over loopback.
        backend: the backend of the group. With `nccl` each rank has the GPU of its number.

    Raises:
        TimeoutError: if the ranks have not finished within `limit_s`.
    """
    with tempfile.TemporaryDirectory(prefix="fastddp-bench-") as folder:
        context = mp.spawn(
            rank_main,
            (ranks, Path(folder), threads, function, args, hosts, backend),
            nprocs=ranks,
            join=False,
        )
        deadline = time.monotonic() + limit_s
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(
                    f"{ranks} ranks did not finish {function.__name__} in {limit_s:.0f} s"
                )
        return read_results(Path(folder), ranks)


def read_results(folder: Path, ranks: int) -> list[Any]:
    """Returns the results that the ranks have left in a folder, in rank order."""
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(ranks)]


def rank_main(
    rank: int,
    ranks: int,
    folder: Path,
    threads: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    hosts: Sequence[Host] = (),
    backend: str = "gloo",
) -> None:
    """Runs the function in the process of one rank, and leaves its result in the folder."""
    if hosts:
        hosts[rank * len(hosts) // ranks].enter()
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        device_id=device,
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=COLLECTIVE_LIMIT,
    )
    result = function(*args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
