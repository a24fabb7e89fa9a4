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
import hashlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from fastddp import config, extension
from fastddp.collectives import Loan, settle
from fastddp.version import __version__

_log = logging.getLogger("fastddp")

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
        atexit.register(_end_pending)


def _end_pending() -> None:
    """Ends the collectives under way, while what was chained to them can still run.

    Once the interpreter takes itself apart, a thread that asks for the GIL ends the process.
    """
    for group in (*dist.distributed_c10d._world.pg_map, *_counterparts.values()):
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


def _make_counterpart(group: ProcessGroup) -> ProcessGroup | None:
    if type(group) is not ProcessGroup:  # a class of the user's, which has its own collectives
        return None
    inner = group._get_backend(_CPU)
    if not (dist.is_gloo_available() and isinstance(inner, dist.ProcessGroupGloo)):
        return None
    timeout: timedelta = inner.options._timeout
    store = group.get_group_store()
    backend = _connect(inner, store, group.rank(), group.size(), timeout)
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


def _make_gloo(name: str, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, timeout)


def _connect(inner: Any, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Connects the ranks of ``inner``, a gloo backend, by shared memory. Collective.

    Those that have the same place on each of several hosts meet in ``store`` to connect by a lane
    of their own. It is no group that torch.distributed knows: that would have to be made by all
    ranks of the world.

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
        {"host": host, "heap": heap, "version": __version__, "why_not": _short(reason)}
    )
    hosts: dict[str, list[int]] = {}
    for other, card in enumerate(cards):
        hosts.setdefault(card["host"], []).append(other)
    reasons = {card["why_not"] for card in cards if card["why_not"] is not None}
    if 1 < len(hosts) == size or (len(reasons) == 1 and all(card["why_not"] for card in cards)):
        return inner  # as asked for, or as it has to be: nothing to tell
    if reasons:
        meeting.trouble = meeting.trouble or reason
    if len({card["version"] for card in cards}) > 1:
        meeting.trouble = meeting.trouble or f"it has fastddp {__version__}, another rank has not"
    ranks = hosts[cards[rank]["host"]]
    control = None
    if rank == ranks[0] and native is not None:
        control = meeting.attempt(lambda: native.shm_control(len(ranks)))
    addresses = meeting.exchange(
        {"control": None if control is None else control.address().parts()}
    )
    backend: Any = None
    if meeting.everybody_is_well and native is not None:
        backend = meeting.attempt(
            lambda: native.ShmBackend(
                rank,
                size,
                inner,
                ranks,
                [native.ShmAddress(*cards[other]["heap"]) for other in ranks],
                native.ShmAddress(*addresses[ranks[0]]["control"]),
                timeout.total_seconds(),
            )
        )
    meeting.exchange({})  # after this nobody needs the control segment's descriptor any more
    if len(hosts) > 1 and meeting.everybody_is_well:
        count = min(len(local) for local in hosts.values())
        place = ranks.index(rank)
        lane = [local[place] for local in hosts.values()] if place < count else []
        meeting.attempt(
            lambda: backend.set_lanes(
                count,
                lane,
                _make_gloo(f"fastddp lane {place}", store, lane.index(rank), len(lane), timeout)
                if lane
                else None,
            )
        )
        meeting.exchange({})
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
            self.trouble = str(error)
            return None

    def exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns what each rank gave, by rank."""
        data = json.dumps({**mine, "trouble": _short(self.trouble)}).encode()
        assert len(data) <= _MESSAGE_BYTES
        sent = torch.frombuffer(bytearray(data.ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self._size)]
        loans = [Loan(tensor) for tensor in (sent, *received)]
        self._backend.allgather([received], [sent]).wait()
        settle(loans)
        messages = [json.loads(bytes(tensor.numpy())) for tensor in received]
        for other, message in enumerate(messages):
            if message["trouble"] is not None and self.everybody_is_well:
                self.everybody_is_well = False
                if self._rank == 0:
                    _log.warning(
                        "the ranks' memory is not shared, all goes through gloo: rank %d: %s",
                        other,
                        message["trouble"],
                    )
        return messages


def _short(text: str | None) -> str | None:
    """Cuts a text so that two fit into a message, whatever JSON makes of their characters."""
    return None if text is None else text[: _MESSAGE_BYTES // 16]


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
