"""The thread that asks stores: a store that does not answer must not keep the watcher from looking.

The store may live in the very rank that is stopped, and then an answer never comes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

_JOIN_S = 5.0


class Clerk:
    """Runs what it is given in one daemon thread, one after the other."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[str, Callable[[], object]] | None]
        self._queue = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        thread = threading.Thread(target=self._run, name="fastddp store", daemon=True)
        thread.start()
        self._thread = thread

    def ask(self, name: str, errand: Callable[[], object]) -> None:
        """Has an errand run soon, unless one of the same name waits to be run already.

        Args:
            name: the name of the errand.
            errand: the call to make; what it raises is dropped.
        """
        if name in self._waiting:
            return
        self._waiting.add(name)
        self._queue.put((name, errand))

    def stop(self) -> None:
        """Ends the thread, if it can still be ended; waits 5 s for it at most."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while (errand := self._queue.get()) is not None:
            name, call = errand
            self._waiting.discard(name)
            with contextlib.suppress(Exception):  # one errand must not keep others from being run
                call()
            del call
