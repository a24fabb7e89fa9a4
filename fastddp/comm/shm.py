"""The shared-memory backend ``shm``: registration, and how the ranks on one host find each other.

``import fastddp`` registers it, so that ``init_process_group("cpu:shm,cuda:nccl")`` and
``new_group(backend="shm")`` work with plain :mod:`torch.distributed`. Its collectives are C++
(``csrc/shm``); what it has none for goes through a gloo backend inside, and so does what crosses
hosts: there each rank reduces a share of an all-reduce with its host's ranks, then with the ranks
that have the same share on the other hosts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from fastddp import config, extension
from fastddp.comm.groups import watch
from fastddp.comm.hosts import (
    Announcement,
    Hosts,
    announced,
    choose_hosts,
    introduction,
    read_address,
)
from fastddp.comm.meeting import Meeting, explained, short
from fastddp.watch import events, watcher
from fastddp.watch.host import this_host

_GlooOptions = Any  # a timeout, or dist.ProcessGroupGloo._Options, which torch's stubs leave out

_CPU = torch.device("cpu")

# Each group's counterpart, as long as the group lives; None where there is none.
_counterparts: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup | None] = (
    weakref.WeakKeyDictionary()
)


def register() -> None:
    """Makes ``shm`` known to torch.distributed."""
    if dist.is_available() and "shm" not in dist.Backend.backend_list:
        dist.Backend.register_backend("shm", _make_backend, extended_api=True, devices=["cpu"])
        _follow_timeouts()
        atexit.register(_end_pending)


def _follow_timeouts() -> None:
    """Has ``_set_pg_timeout`` reach ``shm`` too: torch's knows gloo and NCCL, by their types.

    Since torch 2.14 there is a ``torch.distributed.set_timeout`` for it, which reaches any backend.
    """
    c10d = dist.distributed_c10d
    set_timeout = getattr(c10d, "_set_pg_timeout", None)
    if hasattr(dist, "set_timeout") or set_timeout is None:
        return

    @functools.wraps(set_timeout)
    def _set_pg_timeout(timeout: timedelta, group: ProcessGroup | None = None) -> None:
        backend = _shm_of(c10d._get_default_group() if group is None else group)
        with warnings.catch_warnings():
            if backend is not None:
                backend._set_default_timeout(timeout)
                warnings.filterwarnings("ignore", message="Set timeout is now only supported")
            set_timeout(timeout, group)

    c10d._set_pg_timeout = _set_pg_timeout


def _shm_of(group: ProcessGroup) -> Any:
    """Returns a group's backend if that is ``shm``, else None."""
    if not isinstance(group, ProcessGroup) or _CPU not in group._device_types:
        return None
    backend = group._get_backend(_CPU)
    return backend if backend.name() == "shm" else None


def _end_pending() -> None:
    """Ends the collectives under way, while what was chained to them can still run.

    Once the interpreter takes itself apart, a thread that asks for the GIL ends the process.
    """
    world = getattr(dist.distributed_c10d, "_world", None)
    for group in (*getattr(world, "pg_map", ()), *_counterparts.values()):
        if group is not None and _CPU in group._device_types:
            with contextlib.suppress(RuntimeError):
                backend = group._get_backend(_CPU)
                if backend.name() == "shm" and not getattr(backend, "is_idle", True):
                    backend.shutdown()


def why_not() -> str | None:
    """Returns why this process cannot use the backend; None if it can."""
    if sys.platform != "linux":
        return "it needs Linux"
    if not config.shm():
        return "FASTDDP_SHM=0"
    return extension.why_not()


def counterpart(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Returns a group of the same ranks that communicates through shared memory where it can.

    Collective at the first call for a group. Returns the group itself where there is nothing to
    gain: tensors that are not on the CPU, another backend than gloo, no ranks that share a host.
    The group that is returned lives as long as the given one.

    Args:
        group: the ranks that communicate.
        device: the device of the tensors that they will send.
    """
    if device.type != "cpu" or group.size() == 1:
        return group
    if group not in _counterparts:
        _counterparts[group] = _make_counterpart(group)
    return _counterparts[group] or group


def has_to_meet(group: ProcessGroup, device: torch.device) -> bool:
    """Returns whether :func:`counterpart` with these arguments would be collective now."""
    return device.type == "cpu" and group.size() > 1 and group not in _counterparts


def _make_counterpart(group: ProcessGroup) -> ProcessGroup | None:
    watch(group)
    if type(group) is not ProcessGroup:  # a class of the user's, which has its own collectives
        return None
    inner = group._get_backend(_CPU)
    if not (dist.is_gloo_available() and isinstance(inner, dist.ProcessGroupGloo)):
        return None
    peers = _Peers(
        inner,
        group.get_group_store(),
        group.rank(),
        group.size(),
        inner.options,
        group.group_name,
    )
    backend = _connect(peers, shared=True)
    if backend is inner:
        return None
    pair = ProcessGroup(group.rank(), group.size())  # type: ignore[call-arg]
    pair._register_backend(_CPU, ProcessGroup.BackendType.CUSTOM, backend)
    pair._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    pair._set_group_name(group.group_name)  # what messages and the board call it
    return pair


def _make_backend(given: Any, _options: Any) -> Any:
    """Makes the backend for torch.distributed, which calls this on every rank of a new group.

    Args:
        given: torch's ``_DistributedBackendOptions``: the store, the ranks and their timeout.
        _options: the options that the script has made for the backend, of which there are none.
    """
    store, rank, size = given.store, given.group_rank, given.group_size
    # The store in that of the group has a prefix for the device, and nobody keeps it.
    store_of_group = getattr(store, "underlying_store", store)
    ranks = given.global_ranks_in_group or range(size)
    watcher.watch_group(given.group_id, ranks, rank, store_of_group)
    inner = _make_gloo("gloo", store, rank, size, given.timeout)
    return _connect(_Peers(inner, store, rank, size, given.timeout, given.group_id))


def _make_gloo(name: str, store: Any, rank: int, size: int, options: _GlooOptions) -> Any:
    try:
        return dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, options)
    except RuntimeError as error:
        text = explained(error)
        if text == str(error):
            raise
        raise RuntimeError(f"fastddp: rank {rank}: {text}") from error


class _Peers(NamedTuple):
    """The ranks that connect."""

    inner: Any
    """The gloo backend that connects them already."""
    store: Any
    """The store in which further connections are made."""
    rank: int
    """This rank's number."""
    size: int
    """The number of ranks."""
    options: _GlooOptions
    """The timeout of connections, or gloo's options.

    These may be ``inner``'s own: a timeout that is set there later then holds here.
    """
    name: str
    """The name of the group that users know."""

    def make_gloo(self, name: str) -> Any:
        """Makes another gloo backend of all ranks. Collective."""
        return _make_gloo(name, self.store, self.rank, self.size, self.options)


def _connect(peers: _Peers, shared: bool = False) -> Any:
    """Connects ranks that a gloo backend connects already by shared memory. Collective.

    Those that have the same place on each of several hosts meet in their store to connect by a lane
    of their own. A lane is not a group that torch.distributed knows: that would have to be made by
    all ranks of the world.

    Args:
        peers: the ranks that connect.
        shared: whether the script uses their gloo backend too. What goes through gloo then goes
            through another one: it may be launched by another thread, and gloo matches collectives
            by their order.

    Returns:
        A ``ShmBackend``, or the gloo backend itself, on all ranks, where no two of them share a
        host or one of them cannot get at another's memory (which is logged).
    """
    events.start(peers.rank, peers.size)
    inner = peers.inner
    meeting = Meeting(inner, peers.rank, peers.size)
    native, said = _introduce(meeting)
    hosts, problem = choose_hosts(said, peers.rank)
    if hosts is None:
        return inner
    meeting.problem = meeting.problem or problem
    backend = _open_memory(meeting, peers, native, said, hosts.mine, shared)
    if len(hosts.ranks) > 1 and meeting.all_ok:
        _make_lanes(meeting, peers, backend, hosts)
    return backend if meeting.all_ok else inner


def _introduce(meeting: Meeting) -> tuple[ModuleType | None, list[Announcement]]:
    """Returns the extension, if memory can be shared here, and what all ranks say of themselves."""
    reason = why_not()
    native = extension.load() if reason is None else None
    heap = meeting.attempt(lambda: native.shm_heap().parts() if native is not None else None)
    host = meeting.attempt(this_host)
    mine = introduction(heap, host, short(reason))
    return native, meeting.exchange(mine, Announcement.read)


def _open_memory(
    meeting: Meeting,
    peers: _Peers,
    native: ModuleType | None,
    said: Sequence[Announcement],
    local: Sequence[int],
    shared: bool,
) -> Any:
    """Opens the memory of the ranks on this host; returns the backend, None where that failed.

    Args:
        meeting: the ranks' exchange of messages, which gets what goes wrong.
        peers: the ranks that connect.
        native: the extension module; None if memory cannot be shared here.
        said: the announcements of all ranks, by rank.
        local: the ranks of this host; the first of them makes the control segment.
        shared: whether the script uses the gloo backend of the ranks too.
    """
    control = None
    if peers.rank == local[0] and native is not None:
        control = meeting.attempt(lambda: native.shm_control(len(local)))
    controls = meeting.exchange(
        {"control": None if control is None else control.address().parts()},
        lambda message: read_address(message["control"]),
    )
    own = peers.inner
    if shared and meeting.all_ok:
        own = meeting.attempt(lambda: peers.make_gloo("fastddp gloo"))
        meeting.synchronise()
    backend: Any = None
    if meeting.all_ok and native is not None:
        backend = meeting.attempt(
            lambda: native.ShmBackend(
                peers.rank,
                peers.size,
                own,
                list(local),
                [native.ShmAddress(*announced(said[other].heap)) for other in local],
                native.ShmAddress(*announced(controls[local[0]])),
                peers.inner.options._timeout.total_seconds(),
                peers.name,
            )
        )
    meeting.synchronise()  # from here on nobody needs the descriptor of the control segment
    return backend


def _make_lanes(meeting: Meeting, peers: _Peers, backend: Any, hosts: Hosts) -> None:
    """Connects this rank with those that have the same place on the other hosts."""
    place = hosts.mine.index(peers.rank)
    lane = hosts.lane(place)

    def connect() -> None:
        gloo = None
        if lane:
            name, index = f"fastddp lane {place}", lane.index(peers.rank)
            gloo = _make_gloo(name, peers.store, index, len(lane), peers.options)
        backend.set_lanes(hosts.num_lanes, lane, gloo)

    meeting.attempt(connect)
    meeting.synchronise()
