"""What this process has done lately: events in a ring of fixed size that is always on.

Python and C++ (``csrc/core/events.h``) write to the same ring. It lies in memory, and :func:`dump`
writes a copy of it to a folder. After :func:`trace`, or with the environment variable
``FASTDDP_TRACE``, it lies in a file, which is there whatever becomes of the process.

A forked child records nothing into the parent's ring: it gets a ring of its own with the first
event that Python records.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch.distributed as dist

from fastddp import config, extension
from fastddp.watch.host import this_host
from fastddp.watch.ring import UNKNOWN_RANK, Header, Ring

_Write = Callable[[int, int, int, int], None]


class Kind(IntEnum):
    """What happened, and what the two numbers of the event say: ``a`` and ``b``."""

    FORWARD_BEGIN = 1
    """a: the step, which is the number of rounds of the model that have ended before."""
    FORWARD_END = 2
    ROUND_BEGIN = 3
    """Backward has reached the model. a: the step."""
    BACKWARD_END = 4
    """All gradients are there: what follows until ROUND_END is exposed communication."""
    FILL_BEGIN = 5
    """What has no gradient is filled in. a: the number of the collective in the round."""
    LAUNCH = 6
    """a: the number of the collective in the round, b: bytes."""
    WAIT_BEGIN = 7
    """a: the number of the collective in the round."""
    WAIT_END = 8
    """a: the number of the collective in the round."""
    ROUND_END = 9
    """a: the step. It comes after a failed round too."""
    OPTIMIZER_BEGIN = 10
    OPTIMIZER_END = 11
    COLLECTIVE_BEGIN = 12
    """In shared memory. a: the number in the group plus, times 2**32, 32 bits of the group's id;
    b: bytes plus, times 2**56, the kind in ``csrc/shm/layout.h``."""
    COLLECTIVE_MET = 13
    """All ranks have come. a: as before; b: the rank in the group that was last, times 2**40, plus
    the nanoseconds that it came after the first one, at most 2**40 - 1."""
    COLLECTIVE_END = 14
    """a: as before."""
    ERROR = 15
    """In a collective in shared memory (a: as before), or in a round of a model (a: 0)."""
    STALL_BEGIN = 16
    """a: the rank at fault."""
    STALL_END = 17
    """a: the rank at fault, b: nanoseconds."""
    INTERRUPTED = 18


_ring: Ring | None = None
_write: _Write | None = None
_file: Path | None = None  # where the ring is, if it is in a file
_folder: Path | None = None  # where it is to be
_lock = threading.RLock()  # for changes of these


def record(kind: Kind, owner: int = 0, a: int = 0, b: int = 0) -> None:
    """Records an event that happens now. May be called by any thread; costs less than 1 us.

    Args:
        kind: what has happened.
        owner: the number of the model that it concerns, see :class:`fastddp.comm.labels.Owner`;
            0 for none.
        a: the first number that :class:`Kind` describes, 64 bits.
        b: the second one, 64 bits.
    """
    (_write or start())(kind, owner, a, b)


def start(rank: int | None = None, world_size: int = 0) -> _Write:
    """Makes the ring if there is none, also for C++, and has it say which rank this is.

    Args:
        rank: the rank if there is no default group, or it is made in this moment; None if it is not
            known.
        world_size: the number of ranks, likewise.
    """
    global _folder
    with _lock:
        ring = _ring
        if ring is None:
            ring = Ring.make()
            ring.set(Header.HOST, _host())
            _use(ring)
            if hasattr(os, "register_at_fork"):
                _follow_forks()
            _folder = _folder or config.trace()
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        if rank is not None:
            ring.set(Header.RANK, rank)
            ring.set(Header.WORLD_SIZE, world_size)
        if _folder is not None:
            try:
                _move_to(_folder)
            except OSError as error:
                warnings.warn(
                    f"fastddp: no events are written to {_folder}: {error}; make it a folder with"
                    " room for 1 MiB per rank that this process may write to",
                    RuntimeWarning,
                    stacklevel=2,
                )
                _folder = None
        assert _write is not None
        return _write


def trace(directory: str | os.PathLike[str]) -> None:
    """Has the events of this process in a file from now on, which outlives it however it ends.

    The file is ``rank-<rank>.<pid>.ring`` in the folder, of 1 MiB: it holds the latest 32,768
    events, also those from before this call. A process that is not a rank yet has it from when
    it becomes one. Not collective; may be called from any thread, and again for another folder. The
    environment variable ``FASTDDP_TRACE`` does the same from the start on.

    Args:
        directory: the folder, which is made if it is not there. Ranks may have the same one.

    Raises:
        OSError: if the folder or the file cannot be made, or written.

    Example::

        fastddp.trace("out")
        model = fastddp.wrap(model)
    """
    global _folder
    folder = Path(directory).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock:
        if _ring is not None:
            _move_to(folder)
        _folder = folder


def dump(directory: str | os.PathLike[str]) -> Path:
    """Writes the events that the ring holds now to a file. Not collective; from any thread.

    Where the ring is in such a file of this folder anyway, nothing is written.

    Args:
        directory: the folder, which is made if it is not there.

    Returns:
        The file, ``rank-<rank>.<pid>.ring`` in the folder; another dump there writes over it.

    Raises:
        OSError: if it cannot be written.
    """
    start()
    ring = _ring
    assert ring is not None
    folder = Path(directory).absolute()
    path = folder / _name(ring)
    if path != _file:
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{threading.get_native_id()}.new")
        try:
            beside.write_bytes(ring.copy())
            beside.replace(path)  # whoever reads the folder finds whole files only
        except OSError:
            beside.unlink(missing_ok=True)
            raise
    return path


def snapshot() -> bytes:
    """Returns the ring as it is now, see :mod:`fastddp.watch.ring_reader`. From any thread."""
    start()
    ring = _ring
    assert ring is not None
    return ring.copy()


def _host() -> int:
    try:
        host = this_host()
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(host.encode()).digest()[:8], "little")


def _name(ring: Ring) -> str:
    rank = ring.get(Header.RANK)
    return f"rank-{'unknown' if rank == UNKNOWN_RANK else rank}.{os.getpid()}.ring"


def _use(ring: Ring) -> None:
    global _ring, _write
    native = extension.load()
    if native is None:
        _ring, _write = ring, ring.write
    else:  # its threads write too, and only it can take their turns
        native.use_events(ring.address)
        _ring, _write = ring, native.record_event


def _move_to(folder: Path) -> None:
    """Goes on in a file. An event that another thread records at this very moment may be lost."""
    global _file
    assert _ring is not None
    path = folder / _name(_ring)
    if path == _file:
        return
    if _file is not None and _file.parent == folder:  # the rank was not known before
        _file.replace(path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _use(_ring.continued_in(path))
    _file = path


@functools.cache
def _follow_forks() -> None:
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """Leaves the ring to the parent process."""
    global _ring, _write, _file, _lock
    _ring = _write = _file = None
    _lock = threading.RLock()  # another thread may have held it
    native = extension.load()
    if native is not None:
        native.use_events(0)
