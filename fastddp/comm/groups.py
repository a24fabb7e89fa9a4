"""Facts about a process group, also about one that torch's registry does not know."""

from __future__ import annotations

import contextlib
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastddp.watch import watcher

_watched: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def communication_device(group: ProcessGroup) -> torch.device:
    """Returns a device that the group can communicate from: the CPU where it can.

    Else the current device of a type that it can; see :func:`fastddp.device.streams.on_device`.
    """
    types = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in types else types[0])


def timeout_of(group: ProcessGroup, device: torch.device | None = None) -> timedelta:
    """Returns how long a collective of a group may take.

    Args:
        group: the process group; one of the user's making need not have a timeout, and torch's
            default is returned then.
        device: the device of the collective's tensors, by default :func:`communication_device`.
    """
    backend = None
    with contextlib.suppress(RuntimeError):
        backend = group._get_backend(device or communication_device(group))
    options = getattr(backend, "options", None)
    timeout: timedelta = getattr(options, "_timeout", timedelta(minutes=30))
    return timeout


def store_of(group: ProcessGroup) -> Any:
    """Returns the group's store; None for a group of the user's making that has none."""
    try:
        return group.get_group_store()
    except (RuntimeError, AttributeError):
        return None


def name_of(group: ProcessGroup) -> str:
    """Returns the group's name, the same on every rank; empty for one of the user's making."""
    try:
        return str(group.group_name)
    except (RuntimeError, AttributeError):
        return ""


def watch(group: ProcessGroup) -> None:
    """Has the watcher look at the waits for a group's ranks. Not collective.

    The first call for a group takes one ``set`` in the group's store; the others cost nothing. The
    default group is watched too.

    Args:
        group: the ranks that communicate; one that torch's registry does not know is not watched.

    Raises:
        ValueError: if ``FASTDDP_STALL`` or ``FASTDDP_STALL_SECONDS`` is not valid.
    """
    if group in _watched:
        return
    _watched.add(group)
    world = dist.group.WORLD  # a script may wait in it while other ranks wait in this group
    if world is not None:
        watch(world)
    name, store = name_of(group), store_of(group)
    if not name or store is None:
        return
    try:
        ranks = dist.get_process_group_ranks(group)
    except (RuntimeError, ValueError, KeyError):
        return
    watcher.watch_group(name, ranks, group.rank(), store)


def given_group(group: ProcessGroup | None, device_mesh: Any = None) -> ProcessGroup:
    """Returns the process group that a script names, the default group if it names none.

    Args:
        group: a process group, or None.
        device_mesh: a ``torch.distributed.DeviceMesh`` of one dimension, in place of a group.

    Raises:
        RuntimeError: if both are given, or the mesh has another number of dimensions.
        ValueError: if this rank is not a member of the group, or there is no default group.
    """
    if group is not None and device_mesh is not None:
        raise RuntimeError("Cannot specify both process_group and device_mesh arguments.")
    if device_mesh is not None:
        if device_mesh.ndim != 1:
            raise RuntimeError(f"Only 1D device mesh is supported, but got {device_mesh}.")
        group = device_mesh.get_group(mesh_dim=0)
    if group is not None:
        if not isinstance(group, ProcessGroup):
            raise ValueError(
                f"fastddp: process_group={group!r} is not a process group that this rank is a"
                " member of; wrap the model on the group's ranks only"
            )
        return group
    if not dist.is_initialized():
        raise ValueError(
            "Default process group has not been initialized, please make sure to call"
            " init_process_group (or use fastddp.wrap, which does)."
        )
    world = dist.group.WORLD
    assert world is not None
    return world
