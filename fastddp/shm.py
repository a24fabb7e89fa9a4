"""The shared-memory backend ``shm``: registration, and how the ranks on one host find each other.

``import fastddp`` registers it, so that ``init_process_group("cpu:shm,cuda:nccl")`` and
``new_group(backend="shm")`` work with plain :mod:`torch.distributed`. Its collectives are C++
(``csrc/shm``); what it has none for, and what crosses hosts, goes through a gloo backend inside.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastddp import config, extension
from fastddp.collectives import Loan, settle

if TYPE_CHECKING:
    from fastddp import _C

_log = logging.getLogger("fastddp")

_MESSAGE_BYTES = 1024
_CPU = torch.device("cpu")

# A group's counterpart here, as long as the group lives.
_counterparts: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup | None] = (
    weakref.WeakKeyDictionary()
)


def register() -> None:
    """Makes ``shm`` known to torch.distributed; does nothing where the extension is missing."""
    if not dist.is_available() or "shm" in dist.Backend.backend_list:
        return
    dist.Backend.register_backend("shm", _make_backend, devices=["cpu"])


def is_possible() -> bool:
    """Returns whether this process can share memory with others by this backend."""
    return sys.platform == "linux" and config.shm() and extension.load() is not None


def counterpart(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Returns a group of the same ranks that communicates through shared memory where it can.

    Collective at the first call for a group. Returns the group itself where there is nothing to
    gain: tensors that are not on the CPU, another backend than gloo, no ranks that share a host.
    What is returned lives as long as the group.
    """
    if device.type != "cpu" or group.size() == 1 or not is_possible():
        return group
    if group not in _counterparts:
        _counterparts[group] = _make_counterpart(group)
    return _counterparts[group] or group


def _make_counterpart(group: ProcessGroup) -> ProcessGroup | None:
    inner = group._get_backend(_CPU)
    if not isinstance(inner, dist.ProcessGroupGloo):
        return None
    timeout: timedelta = inner.options._timeout
    backend = connect(inner, group.rank(), group.size(), timeout)
    if not _is_ours(backend):
        return None
    pair = ProcessGroup(group.rank(), group.size())
    pair._register_backend(_CPU, ProcessGroup.BackendType.CUSTOM, backend)
    pair._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    pair._set_group_name(f"{group.group_name} (shm)")
    return pair


def _make_backend(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Makes the backend for torch.distributed, which calls this on every rank of a new group."""
    inner = _make_gloo(dist.PrefixStore("gloo", store), rank, size, timeout)
    if not is_possible():
        raise RuntimeError(
            f"fastddp: rank {rank}: the backend 'shm' is not available: "
            + (extension.why_not() or "it needs Linux, and FASTDDP_SHM must not be 0")
            + '; use "gloo" instead'
        )
    return connect(inner, rank, size, timeout, store)


def _make_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def connect(
    inner: Any, rank: int, size: int, timeout: timedelta, store: dist.Store | None = None
) -> Any:
    """Connects the ranks of ``inner``, a gloo backend, by shared memory. Collective.

    Returns:
        A ``ShmBackend``, or ``inner`` itself, on all ranks, where no two of them share a host or
        one of them cannot get at another's memory (which is logged).
    """
    from fastddp import _C

    heap, trouble = None, None
    try:
        heap = _C.shm_heap().parts()
    except RuntimeError as error:
        trouble = str(error)
    cards = _exchange(inner, size, {"host": _host(), "heap": heap, "trouble": trouble})
    hosts: dict[str, list[int]] = {}
    for other, card in enumerate(cards):
        hosts.setdefault(card["host"], []).append(other)
    ranks = hosts[cards[rank]["host"]]
    control = None
    if all(card["trouble"] is None for card in cards) and rank == ranks[0]:
        try:
            control = _C.shm_control(len(ranks))
        except RuntimeError as error:
            trouble = str(error)
    address = None if control is None else control.address().parts()
    cards = [
        card | news
        for card, news in zip(
            cards, _exchange(inner, size, {"control": address, "trouble": trouble}), strict=True
        )
    ]
    backend = None
    if all(card["trouble"] is None for card in cards):
        try:
            backend = _C.ShmBackend(
                rank,
                size,
                inner,
                ranks,
                [_C.ShmAddress(*cards[other]["heap"]) for other in ranks],
                _C.ShmAddress(*cards[ranks[0]]["control"]),
                timeout.total_seconds(),
            )
        except RuntimeError as error:
            trouble = str(error)
    # After this nobody needs the control segment's descriptor any more.
    reports = _exchange(inner, size, {"trouble": trouble})
    for other, report in enumerate(reports):
        if report["trouble"] is not None:
            if rank == 0:
                _log.warning(
                    "fastddp: gradients do not go through shared memory: rank %d: %s",
                    other,
                    report["trouble"],
                )
            return inner
    assert backend is not None
    if len(hosts) > 1:
        return inner  # lanes: to come
    return backend


def _is_ours(backend: Any) -> bool:
    from fastddp import _C

    return isinstance(backend, _C.ShmBackend)


def _host() -> str:
    """Returns what processes have in common that can open each other's memory."""
    parts = [
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.readlink("/proc/self/ns/pid"),
        str(os.geteuid()),
        config.host_id() or "",
    ]
    return " ".join(parts)


def _exchange(backend: Any, size: int, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what each rank gave."""
    data = json.dumps(mine).encode()
    if len(data) > _MESSAGE_BYTES:
        data = json.dumps({**mine, "trouble": "its report is too long"}).encode()
    sent = torch.frombuffer(bytearray(data.ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
    received = [torch.empty_like(sent) for _ in range(size)]
    loans = [Loan(tensor) for tensor in (sent, *received)]
    backend.allgather([received], [sent]).wait()
    settle(loans)
    return [json.loads(bytes(tensor.numpy())) for tensor in received]
