"""A store at which the ranks of one job meet, where torchrun does not provide one."""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import time
import uuid
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fastddp.comm.environment import RENDEZVOUS, Environment, MeetingPoint
from fastddp.comm.launchers import LOOPBACK

if TYPE_CHECKING:  # a torch without torch.distributed has none
    from torch._C._distributed_c10d import Store, TCPStore

_log = logging.getLogger("fastddp")
# How long rank 0 waits for the others without a word.
_PATIENCE = timedelta(seconds=10)
_PAUSE_S = 0.2
# Each group gets names of its own in the store, and the store stays while this process does: a rank
# may make its second group before another has left the first. A forked child has none of these.
_stores: dict[tuple[str, int, int], TCPStore] = {}
# By process and job, the groups for which all ranks have come: the same number on each of them,
# also where one has called in vain before.
_num_groups: Counter[tuple[int, str]] = Counter()


def open_local_store(port: int = 0) -> TCPStore:
    """Returns a store kept by this process, which only processes of this machine can reach.

    Args:
        port: the number of the port to listen on; 0 for one that is free.

    Raises:
        OSError: if the port is taken.
    """
    # TCPStore by itself would listen on every interface.
    listener = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def meet(environment: Environment, timeout: timedelta | None) -> Store:
    """Returns a store that all ranks share; rank 0 keeps it. Collective.

    Args:
        environment: what the launcher said, with a meeting point.
        timeout: the time to wait for the other ranks; None for torch's default.

    Raises:
        RuntimeError: if the ranks do not meet, or this process is not the rank that it seems to be.
    """
    from torch.distributed.constants import default_pg_timeout

    meeting = environment.meeting
    assert meeting is not None
    keeps = environment.rank == 0
    if keeps and meeting.host_from and not _is_here(meeting.host):
        raise RuntimeError(
            f"fastddp: rank 0 of {environment.world_size} is on {socket.gethostname()}, but the"
            f" ranks would meet on {meeting.host}, the first host of {meeting.host_from}. Set"
            " MASTER_ADDR to rank 0's host, the same on all ranks"
        )
    patience = timeout or default_pg_timeout
    give_up_at = time.monotonic() + patience.total_seconds()
    while True:
        store = _connect(environment, meeting, timeout)
        store.set_timeout(patience)  # as torch does with its own
        try:
            _claim(environment, store)
            break
        except _EarlierRun:  # whose rank 0 still keeps its store; the next one's comes when it ends
            del _stores[meeting.host, meeting.port, os.getpid()]
            if time.monotonic() > give_up_at:
                raise
            time.sleep(_PAUSE_S)
    this = (os.getpid(), meeting.job)
    name = f"{meeting.job} group {_num_groups[this]}"
    of_group = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    _call_the_roll(environment, of_group, patience)
    _num_groups[this] += 1
    return of_group


def _connect(
    environment: Environment, meeting: MeetingPoint, timeout: timedelta | None
) -> TCPStore:
    """Returns the store of this process for a meeting; rank 0's is where all others connect."""
    where = (meeting.host, meeting.port, os.getpid())
    if where in _stores:
        return _stores[where]
    keeps = environment.rank == 0
    # Ranks of one launcher start together: unless told, wait TCPStore's five minutes.
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    try:
        if keeps and meeting.host == LOOPBACK:
            _stores[where] = open_local_store(meeting.port)
        else:
            options |= {"is_master": keeps, "wait_for_workers": False}
            _stores[where] = dist.TCPStore(  # type: ignore[attr-defined]
                meeting.host, meeting.port, **options
            )
    except (dist.DistError, OSError) as error:
        raise RuntimeError(
            f"{_here(environment)} cannot {'listen' if keeps else 'meet rank 0'} at"
            f" {meeting.host}:{meeting.port}; set MASTER_ADDR to rank 0's host and MASTER_PORT"
            f" to a free port there, the same on all ranks; if rank 0 started this process, set"
            f" FASTDDP_LAUNCHER=0 in it ({error})"
        ) from error
    return _stores[where]


def _here(environment: Environment) -> str:
    """Returns what messages call this process."""
    rank, size = environment.rank, environment.world_size
    return f"fastddp: rank {rank} of {size}, started by {environment.launcher},"


class _EarlierRun(RuntimeError):
    """The store is that of a program that the same launcher has run before."""


@functools.cache
def _name_of(pid: int) -> str:
    return f"process {pid} on {socket.gethostname()} ({uuid.uuid4().hex[:12]})"


def _claim(environment: Environment, store: Store) -> None:
    """Makes this process the one that is its rank, for as long as the store stays.

    Raises:
        RuntimeError: if another process is. What a rank starts inherits the launcher's variables.
    """
    assert environment.meeting is not None
    mine = _name_of(os.getpid())
    key = f"{environment.meeting.job} process of rank {environment.rank}"
    here = _here(environment)
    try:
        owner = store.compare_set(key, "", mine).decode(errors="replace")
    except dist.DistError as error:  # its rank 0 has ended since this process has connected
        raise _EarlierRun(f"{here} has lost the store of rank 0: {error}") from error
    if owner == mine:
        return
    text = f"{here} is {owner!r} already, not this {mine!r}."
    if _has_ended(owner):
        raise _EarlierRun(f"{text} That one has ended, but rank 0 of its run has not")
    raise RuntimeError(
        f"{text} If one of them started the other, which has inherited its variables, set"
        f" FASTDDP_LAUNCHER=0 in the one that is not a rank; for ranks of its own, set"
        f" {', '.join(RENDEZVOUS)}, or call torch.distributed.init_process_group before wrap"
    )


def _has_ended(name: str) -> bool:
    """Returns whether a process of this host, as :func:`_name_of` calls it, has ended."""
    found = re.fullmatch(r"process (\d{1,9}) on (.+) \(\w+\)", name)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _call_the_roll(environment: Environment, store: Store, timeout: timedelta) -> None:
    """Waits until all ranks have come and rank 0 has seen it. Who gave up before may come again.

    Raises:
        RuntimeError: if some have not by the timeout; rank 0 names them.
    """
    assert environment.world_size is not None
    here = _here(environment)
    keys = [f"rank {rank} is here" for rank in range(environment.world_size)]
    store.set(keys[environment.rank or 0], "")
    if environment.rank != 0:
        try:
            store.wait(["all are here"], timeout)
        except dist.DistError as error:
            raise RuntimeError(
                f"{here} has not heard from rank 0 that all ranks are there, for"
                f" {timeout.total_seconds():g} s or until its end: {error}"
            ) from error
        return
    patience = min(_PATIENCE, timeout)
    rest = max(timeout - patience, timedelta(milliseconds=1))  # to a store 0 is for ever
    for wait in (patience, rest):
        try:
            store.wait(keys, wait)
            store.set("all are here", "")
            return
        except dist.DistStoreError:
            missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            text = f"{here} waits for rank(s) {', '.join(missing)}"
            if wait is patience:
                _log.warning("%s; have they failed, or do they run another script?", text)
    raise RuntimeError(f"{text}, which have not come within {timeout.total_seconds():g} s")


def _is_here(host: str) -> bool:
    """Whether an address of the host is one of this machine."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
                return True
            except OSError:
                continue
    return False
