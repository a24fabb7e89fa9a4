"""Why ranks wait: a pure function of what is known of them.

A *stall* is a wait that has lasted for long. The rank that waits is not the one to ask about it:
what counts is what the ranks do that have not come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from fastddp.watch.deadlock import FRESH_NS
from fastddp.watch.frames import Frame, is_at_breakpoint, is_at_end
from fastddp.watch.layout import Ending
from fastddp.watch.meeting_points import absent_from, bound_together, together_with, waits_of
from fastddp.watch.process import Kind
from fastddp.watch.snapshot import WaitSeen
from fastddp.watch.view import Facts, Member, View

BUSY_SHARE = 0.25
"""A process that uses that much of a core computes, and is not stuck."""


class Cause(Enum):
    """What a rank does that has not come."""

    DEAD = "its process is dead"
    OUT_OF_MEMORY = "its process is dead, and the system has killed one for want of memory"
    STOPPED = "its process is stopped"
    DEBUGGED = "it is at a breakpoint, or a debugger holds it"
    EXITING = "its script has ended"
    INTERRUPTED = "it was interrupted"
    ELSEWHERE = "it waits in another collective"
    BUSY = "it computes"
    HOLDS_GIL = "a call that holds Python's lock has not returned"
    INPUT = "it waits for its input"
    SLEEPS = "it sleeps"
    NOT_SEEN = "nothing is known of it"


@dataclass(frozen=True)
class Absence:
    """A rank that has not come to a collective."""

    rank: int
    cause: Cause
    member: Member
    waits: WaitSeen | None = None
    """What it waits in instead."""
    waits_for: tuple[int, ...] = ()
    """The ranks that it waits for there."""

    @property
    def is_unknown(self) -> bool:
        """Whether the rank has not used the group yet, or, on another host, has not answered."""
        member = self.member
        return self.cause is Cause.NOT_SEEN and member.board is None and not member.answer


@dataclass(frozen=True)
class Stall:
    """A wait that has lasted for long."""

    rank: int
    """The rank that waits, in the default group."""
    wait: WaitSeen
    lasted_s: float
    together: tuple[int, ...]
    """The other ranks that wait in the same collective."""
    absences: tuple[Absence, ...]
    """The ranks that have not come, and those that these wait for, and so on."""

    @property
    def roots(self) -> tuple[Absence, ...]:
        """The ranks that wait for nobody: because of them nobody moves."""
        return tuple(absence for absence in self.absences if absence.waits is None)

    @property
    def is_debugged(self) -> bool:
        """Whether somebody debugs one of the ranks: then the others wait as they should."""
        return any(absence.cause is Cause.DEBUGGED for absence in self.absences)

    @property
    def is_busy(self) -> bool:
        """Whether the ranks that are waited for compute: they compile, or evaluate."""
        roots = self.roots
        return bool(roots) and all(absence.cause is Cause.BUSY for absence in roots)

    def is_of_newcomers(self, known_s: float) -> bool:
        """Returns whether one of the ranks that are waited for has begun only a moment ago.

        Args:
            known_s: for how many seconds a rank must have been looked at to be judged.
        """
        facts = (absence.member.facts for absence in self.roots)
        return any(each is not None and each.known_s < known_s for each in facts)

    @property
    def is_of_unknown(self) -> bool:
        """Whether nothing at all is known of the ranks that are waited for."""
        roots = self.roots
        return bool(roots) and all(absence.is_unknown for absence in roots)


def judge(view: View, rank: int, wait: WaitSeen, lasted_s: float) -> Stall:
    """Returns who is missing in what a rank waits for, and why.

    Args:
        view: what is known of the ranks.
        rank: the rank that waits, in the default group.
        wait: what it waits in.
        lasted_s: for how many seconds it has waited.
    """
    absences: list[Absence] = []
    together = together_with(view, rank, wait)
    seen = {rank, *together}
    todo = [*absent_from(view, rank, wait)]
    while todo:
        other = todo.pop(0)
        if other in seen:
            continue
        seen.add(other)
        absence = _absence(view, other)
        absences.append(absence)
        todo += absence.waits_for
    return Stall(rank, wait, lasted_s, together, tuple(absences))


def _absence(view: View, rank: int) -> Absence:
    member = view.members.get(rank) or Member(rank)
    waits = waits_of(member.board)
    cause = cause_of(member, view.now_ns)
    if cause is not Cause.ELSEWHERE or not waits:
        return Absence(rank, cause, member)
    return Absence(rank, cause, member, waits[0], absent_from(view, rank, waits[0]))


def cause_of(member: Member, now_ns: int) -> Cause:
    """Returns what a rank does that has not come.

    Args:
        member: what is known of the rank.
        now_ns: the time by the clock of boards.
    """
    facts, board = member.facts, member.board
    if facts is not None and (cause := _of_process(facts)) is not None:
        return cause
    if board is None:
        return Cause.ELSEWHERE if member.note else cause_answered(member.answer)
    if board.ending is Ending.EXITING:
        return Cause.EXITING
    if waits_of(board):
        return Cause.ELSEWHERE
    was_interrupted = board.ending is Ending.INTERRUPTED
    if facts is None:
        return Cause.INTERRUPTED if was_interrupted else Cause.NOT_SEEN
    if is_at_breakpoint(facts.frames):
        return Cause.DEBUGGED
    if is_at_end(facts.frames):
        return Cause.EXITING
    # Of a process that competes with others for the cores, the share may be small.
    if facts.cpu_share >= BUSY_SHARE or facts.state.kind is Kind.RUNNING:
        return Cause.BUSY
    if was_interrupted:  # it may have caught that, and have done much since
        return Cause.INTERRUPTED
    if now_ns - board.seen_ns > FRESH_NS:
        return Cause.HOLDS_GIL
    return Cause.INPUT if is_input(facts.frames) else Cause.SLEEPS


_ANSWERED = {cause.name: cause for cause in (Cause.BUSY, Cause.DEBUGGED, Cause.INPUT, Cause.SLEEPS)}


def cause_answered(answer: str) -> Cause:
    """Returns what a rank of another host does by the first word of what it has answered."""
    return _ANSWERED.get(answer.partition(" ")[0], Cause.NOT_SEEN)


def _of_process(facts: Facts) -> Cause | None:
    kind = facts.state.kind
    if kind in (Kind.GONE, Kind.ZOMBIE):
        return Cause.OUT_OF_MEMORY if facts.killed_for_memory else Cause.DEAD
    return {Kind.STOPPED: Cause.STOPPED, Kind.TRACED: Cause.DEBUGGED}.get(kind)


_INPUT_FILES = ("torch/utils/data/",)
_INPUT_FUNCTIONS = ("__getitem__", "__getitems__", "__next__", "__iter__", "collate_fn")


def is_input(frames: Sequence[Frame]) -> bool:
    """Returns whether a stack is that of a thread that fetches the input of a step."""
    return any(
        frame.function in _INPUT_FUNCTIONS or any(name in frame.file for name in _INPUT_FILES)
        for frame in frames
    )


def speaks(view: View, stalled_ns: int) -> bool:
    """Returns whether this rank is the one that tells of what it waits for.

    That is the lowest one of those that wait for, or with, each other, and can speak.

    Args:
        view: what is known of the ranks.
        stalled_ns: how long a wait must have lasted to be told of.
    """
    return not any(
        other < view.me and _can_speak(view, other, stalled_ns)
        for other in bound_together(view, view.me)
    )


def _can_speak(view: View, rank: int, stalled_ns: int) -> bool:
    board, facts = view.board(rank), view.facts(rank)
    if board is None or board.ending is Ending.EXITING or view.now_ns - board.seen_ns > FRESH_NS:
        return False
    if facts is not None and (_of_process(facts) is not None or facts.state.kind is Kind.UNKNOWN):
        return False
    return any(view.now_ns - wait.since_ns >= stalled_ns // 2 for wait in waits_of(board))
