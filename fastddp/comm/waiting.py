"""Waits for the other ranks of a group, by name: a rank that waits for long says where.

A thread looks at this process's waits once per second. Of one that lasts it leaves a note in the
group's store, as do the other ranks; those without one are missing. A wait that is over sooner
costs microseconds and touches no store.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

_log = logging.getLogger("fastddp")

_TICK_S = 1.0
_NOTE_AFTER_S = 1.0
_ASK_AFTER_S = 2.0  # by then all who wait have left their notes
_WARN_AFTER_S = 10.0
_MAX_NOTE_CHARS = 200
_MAX_ASKED = 256  # of a larger group, that many ranks
_MAX_NAMED = 16


class waiting:
    """Names a wait, in a ``with`` block around nothing but a collective.

    Args:
        group: the ranks that are waited for.
        call: what the script has called, and what goes on in that call.

    Raises:
        torch.distributed.DistBackendError: for a RuntimeError of the collective, such as the
            group's timeout; names this rank, the call and the ranks that were not in it.
    """

    def __init__(self, group: ProcessGroup, call: str) -> None:
        self.call = call
        self.has_note = False
        self.failed = False
        self._rank = group.rank()
        self._size = group.size()
        self._since = 0.0
        self._ask_at_s = _ASK_AFTER_S
        self._absent = ""  # when last asked
        try:
            # Not the group: the thread that frees it last joins its threads, and might be ours.
            self._store: Any = group.get_group_store()
            self.group_name: str = group.group_name
        except (RuntimeError, AttributeError):  # a group of the user's making
            self._store, self.group_name = None, ""

    def __enter__(self) -> None:
        self._since = time.monotonic()
        _watcher.add(self)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.failed = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        _watcher.remove(self)
        if self.failed:
            absent = f" ({self._absent})" if self._absent else ""
            raise dist.DistBackendError(
                f"fastddp: rank {self._rank}: {self.call} failed{absent}: {error}"
            ) from error

    def look(self) -> None:
        """Leaves the note, asks for those of the others and warns, as it is time."""
        lasts_s = time.monotonic() - self._since
        if lasts_s >= _NOTE_AFTER_S and not self.has_note:
            self.has_note = True
            self.write_note(self.call)
        if lasts_s < self._ask_at_s:
            return
        try:
            self._absent = "; ".join(self._ask())
        except (RuntimeError, OSError) as error:
            self._absent = f"the group's store does not say who is missing: {error}"
        if self._ask_at_s < _WARN_AFTER_S:
            self._ask_at_s = _WARN_AFTER_S
            return
        if self._ask_at_s == _WARN_AFTER_S:
            _log.warning(
                "rank %d has waited for %.0f s in %s: %s",
                self._rank,
                lasts_s,
                self.call,
                self._absent or "all ranks are in it",
            )
        self._ask_at_s *= 2

    def write_note(self, text: str) -> None:
        """Tells the other ranks what this one waits in, if they can be told.

        Args:
            text: the name of the call; empty to take an earlier note back.
        """
        if self._store is not None:
            with contextlib.suppress(RuntimeError, OSError):
                self._store.set(_key(self._rank), text[:_MAX_NOTE_CHARS])

    def _ask(self) -> Iterator[str]:
        """Yields where the ranks are that are not in this call."""
        if self._store is None:
            yield "the group has no store that could tell who is missing"
            return
        mine, missing = self.call[:_MAX_NOTE_CHARS], []
        for rank in range(min(self._size, _MAX_ASKED)):
            note = mine if rank == self._rank else self._read_note(rank)
            if not note:
                missing.append(rank)
            elif note != mine:
                yield f"rank {rank} waits in {note}"
        if missing:
            names = ", ".join(map(str, missing[:_MAX_NAMED]))
            rest = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
            ranks = "rank" if len(missing) == 1 else "ranks"
            yield f"{ranks} {names}{rest} not there yet; do all ranks call it?"

    def _read_note(self, rank: int) -> str:
        if not self._store.check([_key(rank)]):
            return ""
        text: str = self._store.get(_key(rank)).decode(errors="replace")[:_MAX_NOTE_CHARS]
        return text if text.isprintable() else "something unreadable"


class _Watcher:
    """The thread, which the first wait of a process starts. A thread that waits takes no lock."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begins anew, also in a forked child, which has no thread."""
        self._waits: dict[int, waiting] = {}
        self._noted: list[waiting] = []  # over, with a note to be taken back
        # The groups in which one has failed: ranks that fail a moment later read its note, so it
        # stays until the group's next wait is over. By name: a store is not kept for it.
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def add(self, wait: waiting) -> None:
        self._waits[id(wait)] = wait
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fastddp waits", daemon=True)
            self._thread.start()

    def remove(self, wait: waiting) -> None:
        del self._waits[id(wait)]
        if wait.failed:
            if wait.has_note:
                self._failed.add(wait.group_name)
        elif wait.has_note or wait.group_name in self._failed:
            self._failed.discard(wait.group_name)
            self._noted.append(wait)

    def stop(self) -> None:
        """Ends the thread: it must not be in a store when the interpreter takes itself apart."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stop.wait(_TICK_S):
            self._look()

    def _look(self) -> None:
        while self._noted:
            self._noted.pop().write_note("")
        for wait in list(self._waits.values()):
            wait.look()
            if wait.has_note and id(wait) not in self._waits:  # it has ended meanwhile
                if wait.failed:
                    self._failed.add(wait.group_name)
                else:
                    self._noted.append(wait)


def _key(rank: int) -> str:
    return f"fastddp waits/{rank}"


_watcher = _Watcher()
atexit.register(_watcher.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watcher.forget)
