"""What the launcher said about this process, and the process group made from it."""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastddp import config
from fastddp.comm import launchers
from fastddp.comm.launchers import LOOPBACK, Place, number

if TYPE_CHECKING:  # a torch without torch.distributed has none
    from torch._C._distributed_c10d import Store, TCPStore

_log = logging.getLogger("fastddp")
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WHAT_IT_IS = {
    "WORLD_SIZE": "the number of ranks",
    "MASTER_ADDR": "rank 0's host",
    "MASTER_PORT": "a free port there",
}
# With one of these, the caller of init_process_group says it.
_SAYS_WHO = ("init_method", "store", "rank", "world_size")
# If one of these shows a process one device only, it is that rank's.
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# How long rank 0 waits for the others without a word.
_PATIENCE = timedelta(seconds=10)
_PAUSE_S = 0.2
# Each group gets names of its own in the store, and the store stays while this process does: a rank
# may make its second group before another has left the first. A forked child has none of these.
_stores: dict[tuple[str, int, int], TCPStore] = {}
# By process and job, the groups for which all ranks have come: the same number on each of them,
# also where one has called in vain before.
_num_groups: Counter[tuple[int, str]] = Counter()


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks meet that were not told by torchrun's variables."""

    host: str
    port: int
    job: str
    """Keeps apart ranks of two jobs that came to the same port."""
    host_from: str | None
    """What it was derived from, or None if the user set it."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The launcher's variables. None where one is not set."""

    rank: int | None
    world_size: int | None
    local_rank: int | None
    launcher: str = "torchrun's variables"
    meeting: Meeting | None = None
    """None where torch's own ``env://`` knows it."""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process as one of several ranks, or of one."""
        return self.rank is not None


def describe_environment() -> Environment:
    """Returns what the environment says: torchrun's variables, or else those of other launchers.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT win over those, also one by one.

    Raises:
        RuntimeError: if only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are known, or
            one is not the number it should be; names them.
        ValueError: if FASTDDP_LAUNCHER is neither 0 nor 1.
    """
    place = None if all(name in os.environ for name in _RENDEZVOUS) else _find_place()
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
    """Returns the index of a rank's GPU among those that this process sees; None if it has none."""
    count = torch.cuda.device_count()
    if 0 <= local_rank < count:
        return local_rank
    return 0 if count == 1 and any(name in os.environ for name in _VISIBLE_DEVICES) else None


def init_process_group(
    backend: str | None = None, timeout: timedelta | None = None, **options: Any
) -> None:
    """Makes the default process group: torch's function, with the fastest backend as default.

    Collective.

    Args:
        backend: None for NCCL on CUDA and shared memory on the CPU, or gloo where memory cannot be
            shared; ranks on several hosts share it within each.
        timeout: of collectives; None for torch's default.
        **options: see :func:`torch.distributed.init_process_group`. Without ``init_method``,
            ``store``, ``rank`` and ``world_size``, the launcher's environment says who the ranks
            are: torchrun's variables, or those of srun, mpirun and others (docs/launching.md).

    Raises:
        RuntimeError: if it says only half of that; names what is missing.
    """
    if all(options.get(name) in (None, -1) for name in _SAYS_WHO):
        environment = describe_environment()
        if environment.meeting is not None:
            options["store"] = _meet(environment, timeout)
            options["rank"], options["world_size"] = environment.rank, environment.world_size
    dist.init_process_group(backend or default_backend(), timeout=timeout, **options)


def open_local_store(port: int = 0) -> TCPStore:
    """Returns a store kept by this process, which only processes of this machine can reach.

    Args:
        port: where it listens; 0 for one that is free.

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
            device = find_cuda_device(environment.local_rank)
            if device is not None:  # else whoever wants to use one gets the error
                torch.cuda.set_device(device)
        init_process_group(timeout=timeout)
    return dist.group.WORLD


def _find_place() -> Place | None:
    return launchers.find() if config.launcher() else None


def _described() -> Environment:
    """Returns what torchrun's variables say, all of them or none."""
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
                f" process, says {value}. Set all of {', '.join(_RENDEZVOUS)}, or leave {name} out"
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
    meeting = Meeting(
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


def _meet(environment: Environment, timeout: timedelta | None) -> Store:
    """Returns a store that all ranks share; rank 0 keeps it."""
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


def _connect(environment: Environment, meeting: Meeting, timeout: timedelta | None) -> TCPStore:
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
        f" FASTDDP_LAUNCHER=0 in the one that is no rank; for ranks of its own, set"
        f" {', '.join(_RENDEZVOUS)}, or call torch.distributed.init_process_group before wrap"
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
