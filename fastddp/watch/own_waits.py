"""Waits of this process that the watcher writes on the board: named ones, and the script's own."""

from __future__ import annotations

import threading

from fastddp.watch import named
from fastddp.watch.board import Board
from fastddp.watch.layout import Source, id_of
from fastddp.watch.script_call import ScriptCall, collective_of_script
from fastddp.watch.timing import Timing

_NAMED_AFTER_S = 1.0
_SCRIPT_AFTER_S = 1.0


class OwnWaits:
    """Brings waits to the board once they last.

    Args:
        own_board: the board of this process.
        timing: the pace of the watcher.
    """

    def __init__(self, own_board: Board, timing: Timing) -> None:
        self._board = own_board
        self._timing = timing
        self._call: ScriptCall | None = None
        self._call_since_ns = 0
        self._call_place: int | None = None

    def show(self, now_ns: int) -> None:
        """Brings the board up to date."""
        self._show_named(now_ns)
        self._show_script(now_ns)

    def _show_named(self, now_ns: int) -> None:
        patience_ns = 1e9 * self._timing.soon_s(_NAMED_AFTER_S)
        for wait in list(named.waits.values()):
            if wait.place is not None or now_ns - wait.since_ns < patience_ns:
                continue
            wait.place = self._board.begin_wait(
                Source.NAMED,
                wait.call,
                since_ns=wait.since_ns,
                group=wait.group.id if wait.group is not None else 0,
                thread=wait.thread,
            )
            if id(wait) not in named.waits:  # it has ended meanwhile
                place, wait.place = wait.place, None
                self._board.end_wait(place)

    def _show_script(self, now_ns: int) -> None:
        call = collective_of_script()
        if call != self._call:
            self._board.end_wait(self._call_place)
            self._call, self._call_since_ns, self._call_place = call, now_ns, None
        lasted_ns = now_ns - self._call_since_ns
        patience_ns = 1e9 * self._timing.soon_s(_SCRIPT_AFTER_S)
        if call is not None and self._call_place is None and lasted_ns >= patience_ns:
            self._call_place = self._board.begin_wait(
                Source.SCRIPT,
                f"{call.call} on group '{call.group_name}'",
                since_ns=self._call_since_ns,
                group=id_of(call.group_name),
                thread=threading.main_thread().native_id or 0,
            )
