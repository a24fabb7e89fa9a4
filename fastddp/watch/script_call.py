"""A collective of torch.distributed that the script has called and is still in."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

# Each of them ends on no rank before all have called it. Not broadcast and the like: there a rank
# may be through before another one begins. Nor monitored_barrier, in which nothing tells one call
# from the next: a loop of short ones would look like a single long one.
_SYMMETRIC = frozenset(
    {
        "barrier",
        "all_reduce",
        "all_reduce_coalesced",
        "all_gather",
        "all_gather_single",
        "all_gather_into_tensor",
        "all_gather_coalesced",
        "all_gather_object",
        "_all_gather_base",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "_reduce_scatter_base",
        "all_to_all",
        "all_to_all_single",
    }
)
_OURS = str(Path(__file__).parents[1]) + os.sep
_FILES = tuple(
    os.path.join(os.path.dirname(dist.__file__), name)
    for name in ("distributed_c10d.py", "c10d_logger.py")  # the latter's decorator is around each
)


@dataclass(frozen=True)
class ScriptCall:
    """A collective that the main thread is in."""

    call: str
    """The function of torch.distributed, such as "barrier"."""
    group_name: str
    """The ``group_name`` of its process group."""
    frame_key: int
    """Equal in two answers as long as the call waits for the same thing."""


def collective_of_script() -> ScriptCall | None:
    """Returns the collective of torch.distributed that the main thread is in, if it waits there.

    Only collectives that need all ranks of their group count, and neither those that return at once
    nor those that fastddp calls. Nor does one that blocks before it has a work, as those in shared
    memory do: C++ writes these. Works in any thread, but in one only; not collective.
    """
    ident = threading.main_thread().ident
    # Frames keep their locals alive, so none of them is kept when this returns.
    frame = None if ident is None else sys._current_frames().get(ident)
    if frame is None or not _is_collective(frame) or not dist.is_initialized():
        return None
    inner = outer = frame  # a call such as all_gather_object calls another one
    while frame is not None and frame.f_code.co_filename in _FILES:
        outer = frame if _is_collective(frame) else outer
        frame = frame.f_back
    called_by_fastddp = frame is not None and frame.f_code.co_filename.startswith(_OURS)
    group = outer.f_locals.get("group") or dist.group.WORLD
    name = getattr(group, "group_name", None)  # there is none in a rank outside the group
    work = inner.f_locals.get("work")
    if called_by_fastddp or work is None or not isinstance(name, str):
        return None
    if inner.f_locals.get("async_op"):
        return None
    key = _number_of(work), id(inner), inner.f_lasti, outer.f_lasti
    return ScriptCall(outer.f_code.co_name, name, hash(key))


def _is_collective(frame: FrameType) -> bool:
    return frame.f_code.co_filename == _FILES[0] and frame.f_code.co_name in _SYMMETRIC


_latest: weakref.ref[Any] | None = None
_number = 0


def _number_of(work: Any) -> int:
    """Returns another number for each work.

    The frame of the next call is likely to lie where this one's was, so that its address says
    little. A weak reference is not mistaken for a later work, and keeps none alive.
    """
    global _latest, _number
    if _latest is None or _latest() is not work:
        try:
            _latest = weakref.ref(work)
        except TypeError:  # a work of a backend in Python, with slots
            return id(work)
        _number += 1
    return _number
