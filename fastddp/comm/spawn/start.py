"""`spawn`: a function run on several ranks of this machine, started from plain Python.

The parent starts the ranks, keeps the store at which they meet, and judges how they end. A rank
reports how its function ended, then waits for the parent's word: to leave the group together with
all others, or to be stopped. So a rank that failed still holds its connections while the parent
stops the others, and none of them fails only because a peer went away.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Final

import torch

from fastddp.comm.launchers import LOOPBACK
from fastddp.comm.rendezvous import open_local_store
from fastddp.comm.spawn import by_value
from fastddp.comm.spawn.by_value import Parcel
from fastddp.comm.spawn.parent import Rank, stop, value_of, wait
from fastddp.comm.spawn.rank import rank_main

_START_METHOD: Final = "spawn"  # not fork: neither CUDA nor a running thread survives it


def spawn(
    fn: Callable[..., Any],
    nprocs: int | None = None,
    args: Sequence[Any] = (),
    *,
    timeout_s: float | None = None,
    grace_s: float = 5.0,
) -> list[Any]:
    """Runs ``fn(rank, *args)`` in ``nprocs`` new processes that form one process group.

    Like ``torch.multiprocessing.spawn``, and: the default group exists when ``fn`` is called and is
    destroyed after it (``fn`` calls neither ``init_process_group`` nor a rendezvous; the backend is
    the one that :func:`fastddp.init_process_group` chooses), the launcher's variables are set as
    torchrun sets them (so that :func:`fastddp.wrap` picks this rank's GPU), each rank uses an equal
    share of the CPU cores (``OMP_NUM_THREADS``, unless it is set), and what ``fn`` returns comes
    back.

    If a rank fails, the others are stopped, and the error of the one that failed *first* is raised
    here. Ranks that merely lost their peer do not count as first. The ranks end with the calling
    process, however it ends.

    Args:
        fn: the function to run. One of a module travels by name; any other, as a lambda or one of a
            notebook, ``python -c`` or standard input, by value, with what it refers to, if
            cloudpickle is installed. A script that calls ``spawn`` does so under
            ``if __name__ == "__main__":``, because every rank imports it.
        nprocs: number of ranks. By default as many as there are GPUs; without any, 2: one process
            uses all cores as well, so that ranks on the CPU are for trying things out.
        args: the arguments after the rank. They are pickled, and tensors are shared.
        timeout_s: seconds that each collective, and the start, may take; by default torch's number
            (30 minutes for gloo, 10 for nccl). ``fn`` itself may take as long as it likes.
        grace_s: how many seconds a rank has from SIGTERM to SIGKILL when the ranks are stopped.

    Returns:
        What ``fn`` returned, by rank (torch's function returns None). Where that cannot be pickled,
        None stands in its place, and a RuntimeWarning says so.

    Raises:
        TypeError: if ``fn`` or ``args`` cannot be pickled; says whether cloudpickle would help.
        ValueError: if ``nprocs`` is less than 1, or more than there are GPUs; if ``timeout_s`` is
            not positive.
        Exception: the one that a rank's ``fn`` raised, with "rank 1 of 2: " before its message
            where that is a plain text, and a :class:`fastddp.RankError` as its cause, which shows
            the rank's traceback.
        RankError: if a rank was killed, exited, or raised what cannot be pickled.

    Example::

        def train(rank, epochs):
            model = fastddp.wrap(Model())
            ...
            return loss

        if __name__ == "__main__":
            losses = fastddp.spawn(train, args=(10,))
    """
    nprocs = _check(fn, nprocs, args)
    if timeout_s is not None and timeout_s <= 0:
        raise ValueError(f"fastddp.spawn: timeout_s={timeout_s} is not a time; None is the default")
    context = multiprocessing.get_context(_START_METHOD)
    store = open_local_store()
    ranks: list[Rank] = []
    try:
        with _omp_threads(nprocs):
            for rank in range(nprocs):
                ours, theirs = socket.socketpair()
                environment = _environment(rank, nprocs, store.port)
                process = context.Process(
                    target=rank_main,
                    args=(Parcel((fn, tuple(args))), environment, timeout_s, theirs),
                    name=f"rank-{rank}",
                )
                ranks.append(Rank(rank, process, ours))
                with theirs:
                    _start(process, fn)
        wait(ranks, lambda rank: rank.report is not None)
        for r in ranks:
            r.leave_group()
        wait(ranks, lambda rank: rank.exit_code is not None)
    finally:
        stop(ranks, grace_s)
        del store  # now: an error's traceback would keep it, and its port, for longer
    return [value_of(r, nprocs) for r in ranks]


def _check(fn: Callable[..., Any], nprocs: int | None, args: Sequence[Any]) -> int:
    """Returns the number of ranks."""
    if not callable(fn):
        raise TypeError(f"fastddp.spawn: expected a function, got {type(fn).__name__}")
    if nprocs is not None and not isinstance(nprocs, int):
        raise TypeError(
            f"fastddp.spawn: nprocs={nprocs!r} is not a number. The order is spawn(fn, nprocs,"
            " args), not that of torch.multiprocessing.spawn; name the arguments"
        )
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"fastddp.spawn: args={args!r} is not a tuple; for one argument, (argument,)"
        )
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nprocs is None:
        return num_gpus or 2
    if nprocs < 1:
        raise ValueError(f"fastddp.spawn: nprocs={nprocs}, less than 1")
    if num_gpus and nprocs > num_gpus:
        raise ValueError(
            f"fastddp.spawn: nprocs={nprocs}, but there are {num_gpus} GPU(s) and each rank needs"
            " one; set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    return nprocs


def _start(process: BaseProcess, fn: Callable[..., Any]) -> None:
    can_send_by_value = by_value.can_send_by_value()
    if getattr(fn, "__module__", None) == "__main__" and not (
        can_send_by_value or by_value.main_can_be_imported()
    ):
        raise TypeError(
            "fastddp.spawn: this function is in no file that the ranks could import; to send such"
            " functions, pip install cloudpickle"
        )
    try:
        with by_value.main_left_alone():
            process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        which = "arguments that can be pickled"
        if not can_send_by_value:
            which = f"a function of a module and {which}, or pip install cloudpickle for others"
        raise TypeError(
            f"fastddp.spawn: the function and its arguments travel to the ranks by pickle; use"
            f" {which} ({error})"
        ) from error


@contextlib.contextmanager
def _omp_threads(nprocs: int) -> Iterator[None]:
    """Gives the processes that are started inside their share of the cores.

    By this process's own environment: thread pools are made on import, before a rank's own code
    could set the variable.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // nprocs))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


def _environment(rank: int, nprocs: int, port: int) -> dict[str, str]:
    """Returns the variables that torchrun would set, and where gloo finds the other ranks."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(nprocs),
        "LOCAL_WORLD_SIZE": str(nprocs),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # The store exists already: no rank is to open it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    if "GLOO_SOCKET_IFNAME" not in os.environ and loopback in dict(socket.if_nameindex()).values():
        # gloo would look its host's name up, which may fail, or lead past a firewall.
        environment["GLOO_SOCKET_IFNAME"] = loopback
    return environment
