"""Ends deadlocks: the waits of ranks that can never move fail, at one moment on all of them."""

from __future__ import annotations

import time

from fastddp.watch import text
from fastddp.watch.board import Board
from fastddp.watch.deadlock import deadlock
from fastddp.watch.layout import Header
from fastddp.watch.meeting_points import waits_of
from fastddp.watch.say import say
from fastddp.watch.sight import Sight
from fastddp.watch.snapshot import WaitSeen
from fastddp.watch.timing import Timing
from fastddp.watch.view import View

_ALL_FIND_NS = 5_000_000_000
"""How long a rank that has found a deadlock waits for the others to find it too."""

_ALL_KNOW_NS = 1_000_000_000
"""Within that time all ranks have seen that all have found it, and fail at the same time."""

_FAILS_NS = 3_000_000_000
"""A wait that has not failed so long after the order cannot be ended: it never looks for one."""


class Referee:
    """What this process has found.

    Args:
        own_board: the board of this process.
        sight: knows more of other processes, if it is asked.
        timing: the pace of the watcher.
    """

    def __init__(self, own_board: Board, sight: Sight, timing: Timing) -> None:
        self._board = own_board
        self._sight = sight
        self._timing = timing
        self._observed_s: dict[tuple[int, tuple[int, int]], float] = {}  # of waits of all ranks
        self._suspected: frozenset[tuple[int, tuple[int, int]]] = frozenset()
        self._found = ""  # the text of the error, once it is certain
        self._found_ns = 0
        self._ordered_ns = 0  # when the order was given; 0 if it was not
        self._is_told = False

    def end_deadlock(self, view: View, watched_s: float) -> WaitSeen | None:
        """Orders the wait of this process to fail if the ranks can never move.

        That takes several looks: one finds it, another one confirms it and says so on the board.
        Once all have, all fail. The first one to fail would otherwise end its process, and the
        others would fail for that reason. The order is given once; where the wait cannot be ended
        the text is told instead, once.

        Args:
            view: what is known of the ranks.
            watched_s: for how many seconds it was watched since the last look.

        Returns:
            The wait that was ordered to fail; None for none.
        """
        stuck = deadlock(view, self._timing.stall_ns)
        mine = stuck.get(view.me)
        suspected = frozenset((rank, wait.key) for rank, wait in stuck.items())
        has_lasted = self._has_lasted(view, suspected, watched_s)
        is_certain = suspected == self._suspected and has_lasted
        self._suspected = suspected
        if mine is None or not is_certain:
            self.forget()
            return None
        if not self._found:
            self._found = text.deadlock_text(stuck, self._sight.with_stacks(view, stuck.keys()))
            self._found_ns = time.monotonic_ns()
            self._board.put(Header.DEADLOCK, self._found_ns)
            return None
        found_ns = [them.deadlock_ns for rank in stuck if (them := view.board(rank)) is not None]
        if not all(found_ns) and view.now_ns - self._found_ns < _ALL_FIND_NS:
            return None
        if not self._ordered_ns:
            end_ns = min(max(found_ns), view.now_ns) + _ALL_KNOW_NS
            time.sleep(max(0, end_ns - time.monotonic_ns()) / 1e9)
            self._ordered_ns = time.monotonic_ns()
            if self._board.order_to_fail(mine, self._found):
                return mine
        elif view.now_ns - self._ordered_ns < _FAILS_NS:
            return None
        if not self._is_told:
            self._is_told = True
            say([f"fastddp: rank {view.me}: {self._found}"])
        return None

    def _has_lasted(
        self, view: View, suspected: frozenset[tuple[int, tuple[int, int]]], watched_s: float
    ) -> bool:
        """Returns whether all these waits were seen for long.

        After a suspension all waits look old at once, although nobody had time to end them.
        """
        before = self._observed_s
        self._observed_s = {
            (rank, wait.key): before.get((rank, wait.key), 0.0) + watched_s
            for rank in view.members
            for wait in waits_of(view.board(rank))
        }
        stall_s = self._timing.stall_s
        return all(self._observed_s.get(key, 0.0) >= stall_s for key in suspected)

    def forget(self) -> None:
        """Takes back what was found: the ranks have moved."""
        if self._found:
            self._found, self._ordered_ns, self._is_told = "", 0, False
            self._board.put(Header.DEADLOCK, 0)
