"""Waits that :class:`fastddp.comm.waiting.waiting` names, whatever carries them out."""

from __future__ import annotations

import threading
import time

from fastddp.watch.groups import Watched


class NamedWait:
    """A wait of this process, from its begin to its end.

    Args:
        call: what the script has called, and what goes on in that call.
        group: the group that it is for; None for one that is not watched.
    """

    def __init__(self, call: str, group: Watched | None) -> None:
        self.call = call
        self.group = group
        self.since_ns = time.monotonic_ns()
        self.thread = threading.get_native_id()
        self.place: int | None = None
        """The place on the board; None as long as it is not there."""
        self.came: set[int] = set()
        """The ranks that have been seen in it."""
        self.elsewhere: dict[int, tuple[int, str]] = {}
        """By rank that was not: when it was last seen in another wait, and in which."""
        self.absent = ""
        """Who was missing when the watcher looked last; empty for nobody, or if it has not yet."""


waits: dict[int, NamedWait] = {}
"""Those that are under way, by ``id``. A thread that waits takes no lock."""

failed_ns = 0
"""When the latest of them that has failed did so."""
