"""Tells people of stalls: once when one begins, again with growing pauses, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from fastddp.watch import board, events, groups, named, text
from fastddp.watch.frames import is_at_breakpoint, own, place_in_script
from fastddp.watch.layout import Ending, Source
from fastddp.watch.meeting_points import reached_from, waits_of
from fastddp.watch.process import Kind, state_of
from fastddp.watch.say import say
from fastddp.watch.sight import Sight
from fastddp.watch.snapshot import Snapshot, WaitSeen
from fastddp.watch.stall import Cause, Stall, judge, speaks
from fastddp.watch.timing import Timing
from fastddp.watch.view import View

_BUSY_FACTOR = 30
"""Of ranks that compute, the others tell only after that many times the seconds."""
_UNKNOWN_FACTOR = 3
"""Of ranks that have not begun nothing is known: as a rule they import, or load data. Those of
other hosts take a while to answer."""
_COMES_NO_MORE = (Kind.GONE, Kind.ZOMBIE, Kind.STOPPED, Kind.TRACED)


@dataclass
class _Told:
    """A stall that this process has told of."""

    stall: Stall
    next_at_s: float


class Teller:
    """What this process has told.

    Args:
        sight: knows more of other processes, if it is asked.
        timing: the pace of the watcher.
    """

    def __init__(self, sight: Sight, timing: Timing) -> None:
        self._sight = sight
        self._timing = timing
        self._told: dict[tuple[int, int], _Told] = {}
        self._met_s: dict[tuple[int, int], float] = {}  # since when nobody is missing

    def tell(self, view: View, wait: WaitSeen, observed_s: float) -> None:
        """Tells of a wait of this process, if it is time and nobody else does.

        Args:
            view: what is known of the ranks.
            wait: one of its waits.
            observed_s: for how long it was looked at.
        """
        told = self._told.get(wait.key)
        due_s = told.next_at_s if told is not None else self._timing.stall_s
        if observed_s < due_s or wait.group not in view.groups:
            return
        if not speaks(view, self._timing.stall_ns):
            return
        view = self._sight.with_cpu(view, reached_from(view, [view.me]))
        stall = judge(view, view.me, wait, observed_s)
        if wait.source is Source.SCRIPT and not stall.absences:
            return  # all have called it: the transfer takes long
        is_unknown = stall.is_of_unknown or stall.is_of_newcomers(self._timing.stall_s / 2)
        factor = _BUSY_FACTOR if stall.is_busy else _UNKNOWN_FACTOR if is_unknown else 1
        if observed_s < factor * self._timing.stall_s:
            return
        if stall.absences:
            self._met_s.pop(wait.key, None)
        elif observed_s < self._met_s.setdefault(wait.key, observed_s) + self._timing.stall_s:
            return  # the last one has just come
        view = self._sight.with_stacks(view, [absence.rank for absence in stall.absences])
        stall = judge(view, view.me, wait, observed_s)
        own_board = board.own()
        if own_board is None or wait.key not in {w.key for w in waits_of(own_board.read())}:
            return  # it has ended meanwhile: asking takes time
        while due_s <= observed_s:
            due_s *= 2
        self._told[wait.key] = _Told(stall, due_s)
        if told is None and stall.roots:
            events.record(events.Kind.STALL_BEGIN, wait.owner, stall.roots[0].rank)
        mine = own()
        if not stall.is_debugged and not is_at_breakpoint(mine):
            say(text.stall_lines(stall, view, place_in_script(mine)))

    def tell_ends(self, mine: Snapshot, now_ns: int) -> None:
        """Tells of the stalls that are over.

        Args:
            mine: what the board of this process says.
            now_ns: the time by the clock of boards.
        """
        waits = {wait.key for wait in waits_of(mine)}
        for key in self._met_s.keys() - waits:
            del self._met_s[key]
        for key in self._told.keys() - waits:
            stall = self._told.pop(key).stall
            lasted_ns = now_ns - stall.wait.since_ns
            if stall.roots:
                fault = stall.roots[0].rank
                events.record(events.Kind.STALL_END, stall.wait.owner, fault, lasted_ns)
            has_failed = named.failed_ns >= stall.wait.since_ns
            has_failed |= mine.ending is Ending.INTERRUPTED
            if not stall.is_debugged and not has_failed and _may_have_come(stall):
                say([text.end_line(stall, lasted_ns / 1e9)])

    def forget(self, wait: WaitSeen) -> None:
        """Leaves the end of a wait untold."""
        self._told.pop(wait.key, None)


def _may_have_come(stall: Stall) -> bool:
    """Returns whether a wait has ended because the others came, and not because it failed."""
    for absence in stall.roots:
        them = absence.member.board
        if absence.cause in (Cause.DEAD, Cause.OUT_OF_MEMORY, Cause.EXITING):
            return False
        if them is None:
            continue
        if state_of(them.pid, them.born).kind in _COMES_NO_MORE:
            return False
        if _has_not_moved(stall.wait, them, groups.board_of(absence.rank)):
            return False
    return bool(stall.roots)


def _has_not_moved(wait: WaitSeen, before: Snapshot, now: Snapshot | None) -> bool:
    """Returns whether a rank is where it was in the model that is waited for, as it shows there."""
    model = before.model(wait.owner, wait.group) if wait.owner else None
    return model is not None and now is not None and now.model(wait.owner, wait.group) == model
