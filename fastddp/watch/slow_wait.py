"""A wait in Python that lasts, on the board; ``csrc/core/slow_wait.h`` is the same in C++."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch.distributed as dist

from fastddp.watch import board, named
from fastddp.watch.layout import Source


@dataclass(frozen=True, slots=True)
class What:
    """What a wait is for."""

    text: str
    """The name of the collective, for people."""
    group: int = 0
    """The :func:`fastddp.watch.layout.id_of` its group's name; 0 for no group."""
    label: int = 0
    """The label of the collective, see ``csrc/shm/label.h``."""


class SlowWait:
    """A wait from its first look-around to its end. For one thread.

    Args:
        what: what is waited for.
        since_ns: when the wait began, by ``time.monotonic_ns()``.
    """

    def __init__(self, what: What, since_ns: int) -> None:
        self._what = what
        self._since_ns = since_ns
        self._thread = threading.get_native_id()
        self._place: int | None = None

    def look(self) -> None:
        """Looks around once, to be called several times per second.

        Raises:
            torch.distributed.DistBackendError: if the wait was ordered to fail.
        """
        own = board.own()
        if own is None:
            return
        places = [wait.place for wait in list(named.waits.values()) if wait.thread == self._thread]
        if not places and self._place is None:  # a wait that has a name is on the board already
            self._place = own.begin_wait(
                Source.BACKWARD,
                self._what.text,
                since_ns=self._since_ns,
                group=self._what.group,
                label=self._what.label,
                thread=self._thread,
            )
        for place in (*places, self._place):
            order = own.order_of(place)
            if order:
                raise dist.DistBackendError(order)

    def end(self) -> None:
        """Takes the wait off the board."""
        own = board.own()
        if own is not None:
            own.end_wait(self._place)
        self._place = None
