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
import errno
import functools
import hashlib
import json
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from fastddp import config, extension
from fastddp.comm.collectives import Loan, settle
from fastddp.version import __version__

_log = logging.getLogger("fastddp")

_GlooOptions = Any  # a timeout, or dist.ProcessGroupGloo._Options, which torch's stubs leave out

_MESSAGE_BYTES = 4096
_CPU = torch.device("cpu")

# Each group's counterpart, as long as the group lives; None where there is none.
_counterparts: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup | None] = (
    weakref.WeakKeyDictionary()
)


def register() -> None:
    """Makes ``shm`` known to torch.distributed."""
    if dist.is_available() and "shm" not in dist.Backend.backend_list:
        dist.Backend.register_backend("shm", _make_backend, devices=["cpu"])
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
    What is returned lives as long as the group.
    """
    if device.type != "cpu" or group.size() == 1:
        return group
    if group not in _counterparts:
        _counterparts[group] = _make_counterpart(group)
    return _counterparts[group] or group


def has_to_meet(group: ProcessGroup, device: torch.device) -> bool:
    """Returns whether :func:`counterpart` would be collective now."""
    return device.type == "cpu" and group.size() > 1 and group not in _counterparts


def _make_counterpart(group: ProcessGroup) -> ProcessGroup | None:
    if type(group) is not ProcessGroup:  # a class of the user's, which has its own collectives
        return None
    inner = group._get_backend(_CPU)
    if not (dist.is_gloo_available() and isinstance(inner, dist.ProcessGroupGloo)):
        return None
    backend = _connect(
        inner, group.get_group_store(), group.rank(), group.size(), inner.options, shared=True
    )
    if backend is inner:
        return None
    pair = ProcessGroup(group.rank(), group.size())  # type: ignore[call-arg]
    pair._register_backend(_CPU, ProcessGroup.BackendType.CUSTOM, backend)
    pair._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    return pair


def _make_backend(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Makes the backend for torch.distributed, which calls this on every rank of a new group."""
    inner = _make_gloo("gloo", store, rank, size, timeout)
    return _connect(inner, store, rank, size, timeout)


def _make_gloo(name: str, store: Any, rank: int, size: int, options: _GlooOptions) -> Any:
    try:
        return dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, options)
    except RuntimeError as error:
        text = _explained(error)
        if text == str(error):
            raise
        raise RuntimeError(f"fastddp: rank {rank}: {text}") from error


def _explained(error: Exception) -> str:
    """Returns what an exception says, and about too many open files what to do."""
    text = str(error)
    if os.strerror(errno.EMFILE) not in text or sys.platform == "win32":
        return text
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"this process has as many files open as it may, {limit} (RLIMIT_NOFILE); raise the limit "
        f"(ulimit -n), or make fewer process groups: {text}"
    )


def _connect(
    inner: Any,
    store: Any,
    rank: int,
    size: int,
    options: _GlooOptions,
    shared: bool = False,
) -> Any:
    """Connects the ranks of ``inner``, a gloo backend, by shared memory. Collective.

    Those that have the same place on each of several hosts meet in ``store`` to connect by a lane
    of their own. It is no group that torch.distributed knows: that would have to be made by all
    ranks of the world.

    Args:
        inner: whose ranks these are.
        store: where connections are made.
        rank: this one's.
        size: number of ranks.
        options: the timeout of connections, or gloo's options, which may be ``inner``'s own: a
            timeout that is set there later then holds here.
        shared: whether the script uses ``inner`` too. What goes through gloo then goes through
            another one: it may be launched by another thread, and gloo matches collectives by
            their order.

    Returns:
        A ``ShmBackend``, or ``inner`` itself, on all ranks, where no two of them share a host or
        one of them cannot get at another's memory (which is logged).
    """
    meeting = _Meeting(inner, rank, size)
    reason = why_not()
    native = extension.load() if reason is None else None
    heap = meeting.attempt(lambda: native.shm_heap().parts() if native is not None else None)
    host = meeting.attempt(_host)
    cards = meeting.exchange(
        {"host": host, "heap": heap, "version": __version__, "why_not": _short(reason)}, _Card.read
    )
    hosts: dict[str | None, list[int]] = {}
    for other, card in enumerate(cards):
        hosts.setdefault(card.host, []).append(other)
    reasons = {card.why_not for card in cards if card.why_not is not None}
    if 1 < len(hosts) == size or (len(reasons) == 1 and all(card.why_not for card in cards)):
        return inner  # as asked for, or as it has to be: nothing to tell
    if reasons:
        meeting.trouble = meeting.trouble or reason
    if len({card.version for card in cards}) > 1:
        meeting.trouble = meeting.trouble or f"it has fastddp {__version__}, another rank has not"
    ranks = hosts[cards[rank].host]
    control = None
    if rank == ranks[0] and native is not None:
        control = meeting.attempt(lambda: native.shm_control(len(ranks)))
    controls = meeting.exchange(
        {"control": None if control is None else control.address().parts()},
        lambda message: _address(message["control"]),
    )
    own = inner
    if shared and meeting.everybody_is_well:
        own = meeting.attempt(lambda: _make_gloo("fastddp gloo", store, rank, size, options))
        meeting.exchange({}, _nothing)
    backend: Any = None
    if meeting.everybody_is_well and native is not None:
        backend = meeting.attempt(
            lambda: native.ShmBackend(
                rank,
                size,
                own,
                ranks,
                [native.ShmAddress(*_announced(cards[other].heap)) for other in ranks],
                native.ShmAddress(*_announced(controls[ranks[0]])),
                inner.options._timeout.total_seconds(),
            )
        )
    # After this nobody needs the control segment's descriptor any more.
    meeting.exchange({}, _nothing)
    if len(hosts) > 1 and meeting.everybody_is_well:
        count = min(len(local) for local in hosts.values())
        place = ranks.index(rank)
        lane = [local[place] for local in hosts.values()] if place < count else []
        meeting.attempt(
            lambda: backend.set_lanes(
                count,
                lane,
                _make_gloo(f"fastddp lane {place}", store, lane.index(rank), len(lane), options)
                if lane
                else None,
            )
        )
        meeting.exchange({}, _nothing)
    return backend if meeting.everybody_is_well else inner


class _Meeting:
    """Exchanges small messages between all ranks, and with them what trouble one of them has."""

    def __init__(self, backend: Any, rank: int, size: int) -> None:
        self._backend = backend
        self._rank = rank
        self._size = size
        self.trouble: str | None = None
        self.everybody_is_well = True

    def attempt(self, action: Callable[[], Any]) -> Any:
        """Returns what ``action`` returns; if it raises, None, and there is trouble."""
        try:
            return action()
        except (RuntimeError, OSError) as error:
            self.trouble = _explained(error)
            return None

    def exchange(self, mine: dict[str, Any], read: Callable[[Any], _T]) -> list[_T]:
        """Returns what ``read`` makes of what each rank gave, by rank.

        Nothing that arrives is taken for what it should be: ``read`` raises an error where it is
        not. All ranks see the same, and then nobody is well.
        """
        data = json.dumps({**mine, "trouble": _short(self.trouble)}).encode()
        sent = torch.frombuffer(bytearray(data.ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self._size)]
        loans = [Loan(tensor) for tensor in (sent, *received)]
        self._backend.allgather([received], [sent]).wait()
        settle(loans)
        messages = []
        for other, tensor in enumerate(received):
            trouble, message = self._read(bytes(tensor.numpy()), read)
            messages.append(message)
            if trouble is not None and self.everybody_is_well:
                self.everybody_is_well = False
                if self._rank == 0:
                    _log.warning(
                        "the ranks' memory is not shared, all goes through gloo: rank %d: %s",
                        other,
                        trouble,
                    )
        return messages

    def _read(self, data: bytes, read: Callable[[Any], _T]) -> tuple[str | None, _T]:
        """Returns the trouble of a rank, and what it gave."""
        try:
            message = json.loads(data)
            return _text(message["trouble"], optional=True), read(message)
        except (ValueError, TypeError, LookupError, RecursionError):
            return "it sent what cannot be read", read(_UNREADABLE)


_T = TypeVar("_T")
_UNREADABLE = {"host": None, "heap": None, "version": "", "why_not": None, "control": None}
"""Read in the place of a message that is not what it should be."""

_Parts = tuple[int, int, int, int, int]


class _Card(NamedTuple):
    """What a rank says of itself."""

    host: str | None
    heap: _Parts | None
    version: str
    why_not: str | None

    @classmethod
    def read(cls, message: Any) -> _Card:
        return cls(
            _text(message["host"], optional=True),
            _address(message["heap"]),
            _text(message["version"]),
            _text(message["why_not"], optional=True),
        )


def _nothing(_: Any) -> None:
    """Reads a message that says nothing but whether its rank is in trouble."""


def _text(value: Any, optional: bool = False) -> Any:
    if not (isinstance(value, str) or (optional and value is None)):
        raise TypeError(f"not a text: {value!r}")
    return value


def _address(parts: Any) -> _Parts | None:
    """Reads where a segment is: process, descriptor, bytes, and the two halves of its nonce."""
    if parts is None:
        return None
    process, descriptor, size, high, low = parts
    for part, least, bits in (
        (process, 1, 31),
        (descriptor, 0, 31),
        (size, 1, 63),
        (high, 0, 64),
        (low, 0, 64),
    ):
        if type(part) is not int or not least <= part < 1 << bits:
            raise ValueError(f"no address of a segment: {parts!r}")
    return process, descriptor, size, high, low


def _announced(address: _Parts | None) -> _Parts:
    if address is None:
        raise RuntimeError("a rank has announced no memory")
    return address


def _short(text: str | None) -> str | None:
    """Cuts a text so that two fit into a message, whatever JSON makes of their characters."""
    most = _MESSAGE_BYTES // 3
    while text is not None and len(json.dumps(text)) > most:
        text = text[: min(most, len(text)) * 3 // 4]
    return text


def _host() -> str:
    """Returns what processes have in common that can open each other's memory."""
    if sys.platform != "linux":
        return f"{os.getpid()}"
    evidence = [
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.readlink("/proc/self/ns/pid"),
        str(os.geteuid()),
        config.host_id() or "",
    ]
    return hashlib.sha256(" ".join(evidence).encode()).hexdigest()
