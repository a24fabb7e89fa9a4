"""Waits for collectives that a signal can end: KeyboardInterrupt within a moment, not at the end.

A wait in C++ holds signals up, because Python runs their handlers between its own instructions
only. The shared-memory backend looks for signals itself (``csrc/core/slow_wait.h``); waits for gloo
are cut into short ones here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import ProcessGroup, Work

from fastddp.comm.groups import communication_device
from fastddp.watch.slow_wait import SlowWait, What

_SLICE = timedelta(milliseconds=100)
_SLICE_NS = 100_000_000
_UNNAMED = What("a collective")

WayToWait = Callable[[Work, What], object]
"""Waits for a work, which is called something if that lasts."""


def is_shm(group: ProcessGroup, device: torch.device) -> bool:
    """Returns whether a group's collectives of a device's tensors go through our own backend."""
    return _name_of_backend(group, device) == "shm"


def _name_of_backend(group: ProcessGroup, device: torch.device) -> str:
    """Returns the name of the backend for a device's tensors; empty for another than the CPU."""
    if device.type != "cpu":
        return ""
    try:
        return str(group._get_backend(device).name())
    except RuntimeError:  # a group of the user's making, which has no backends
        return ""


def wait_for(work: Work, group: ProcessGroup, device: torch.device | None = None) -> None:
    """Waits until a collective has ended. May be called from any thread.

    Args:
        work: the collective that is under way.
        group: the group that it was started in.
        device: the device of its tensors, by default
            :func:`fastddp.comm.groups.communication_device`.

    Raises:
        RuntimeError: if the collective fails.
        BaseException: what a signal handler of the script raises meanwhile; then the work may be
            waited for again.
    """
    way_to_wait(group, device or communication_device(group))(work, _UNNAMED)


def way_to_wait(group: ProcessGroup, device: torch.device) -> WayToWait:
    """Returns :func:`wait_for` for a group's collectives, without the group.

    Args:
        group: the process group.
        device: the device of the collectives' tensors.
    """
    # Other transports may take the end of a short wait for a failure.
    is_gloo = _name_of_backend(group, device) == "gloo"
    return _wait_in_slices if is_gloo else _wait_whole


def _wait_whole(work: Work, _: What) -> None:
    work.wait()


def _wait_in_slices(work: Work, what: What) -> None:
    if not _ends_within_a_slice(work):
        slow = SlowWait(what, time.monotonic_ns() - _SLICE_NS)
        try:
            slow.look()
            while not _ends_within_a_slice(work):
                slow.look()
        finally:
            slow.end()


def _ends_within_a_slice(work: Work) -> bool:
    began_ns = time.monotonic_ns()
    try:
        work.wait(_SLICE)
    except RuntimeError:
        # Each transport says in words of its own that the time is over. What comes early is an
        # error of the work, and one that comes late will come early the next time.
        if time.monotonic_ns() - began_ns < _SLICE_NS / 2:
            raise
        if not work.is_completed():
            return False
        work.wait()
    return True
