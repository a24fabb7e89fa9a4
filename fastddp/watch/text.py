"""The lines that tell of a stall, and the text of the error that ends a deadlock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastddp.watch import names
from fastddp.watch.describe import describe_wait
from fastddp.watch.frames import Frame, caller_in_script, place_in_script
from fastddp.watch.meeting_points import waits_of
from fastddp.watch.reasons import likely, why_apart
from fastddp.watch.snapshot import FILLING, Snapshot, WaitSeen
from fastddp.watch.stall import Absence, Cause, Stall, cause_of
from fastddp.watch.view import Facts, Member, View

_MAX_RANKS = 16
_MAX_LINES = 4  # of ranks that have not come


def stall_lines(stall: Stall, view: View, mine: Frame | None) -> list[str]:
    """Returns the lines that tell of a stall.

    Args:
        stall: what is known of it.
        view: what is known of the ranks.
        mine: the place in the script at which this rank waits, if it is known.
    """
    wait = describe_wait(stall.wait, view.board(stall.rank))
    lines = [
        f"fastddp: rank {stall.rank} has waited for {_seconds(stall.lasted_s)} in {wait}{_at(mine)}"
    ]
    if stall.together:
        lines.append(f"  waiting too: {ranks_text(stall.together)}")
    lines += _about_absences(stall.absences)
    reason = likely(stall, view, mine)
    if reason:
        lines.append(f"  likely: {reason}")
    return lines


def end_line(stall: Stall, lasted_s: float) -> str:
    """Returns the line that tells that a stall is over.

    Args:
        stall: the stall, as it was told of last.
        lasted_s: for how many seconds the rank has waited in all.
    """
    last = [absence.rank for absence in stall.roots or stall.absences]
    came = f"; {ranks_text(last)} came last" if last else ""
    return f"fastddp: the wait of rank {stall.rank} is over after {_seconds(lasted_s)}{came}"


def deadlock_text(stuck: Mapping[int, WaitSeen], view: View) -> str:
    """Returns the message of the error that ends a deadlock, the same on every rank.

    Args:
        stuck: the ranks that can never move, with what they wait in.
        view: what is known of the ranks.
    """
    by_text: dict[str, list[int]] = {}
    for rank, wait in sorted(stuck.items()):
        what = describe_wait(wait, view.board(rank)) + _at(_place(view.facts(rank)))
        by_text.setdefault(what, []).append(rank)
    sides = "; ".join(
        f"{ranks_text(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in {what}"
        for what, ranks in by_text.items()
    )
    reason, next_step = why_apart(stuck, view, {})
    return (
        "the ranks wait for each other in different collectives, and none of them can ever go on:"
        f" {sides}. Likely {reason}; next: {next_step}"
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """Returns text such as ``ranks 1, 2 and 5``."""
    shown = [str(rank) for rank in ranks[:_MAX_RANKS]]
    rest = len(ranks) - len(shown)
    if rest:
        return f"ranks {', '.join(shown)} and {rest} more"
    if len(shown) == 1:
        return f"rank {shown[0]}"
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


# ---- who has not come ----------------------------------------------------------------------------


def _about_absences(absences: Sequence[Absence]) -> Iterator[str]:
    alike: dict[str, list[int]] = {}
    for absence in absences:
        alike.setdefault(_about(absence), []).append(absence.rank)
    for count, (text, ranks) in enumerate(alike.items()):
        if count == _MAX_LINES:
            rest = [rank for more in list(alike.values())[count:] for rank in more]
            yield f"  not there either: {ranks_text(rest)}"
            return
        if len(ranks) > 1:
            yield f"  {ranks_text(ranks)} have not come: {_of_each(text)}"
        else:
            yield f"  {ranks_text(ranks)} has not come: {text}"


def _of_each(text: str) -> str:
    return f"each {text.removeprefix('it ')}" if text.startswith("it ") else text


def _about(absence: Absence) -> str:
    member, facts = absence.member, absence.member.facts
    parts = [_doing(absence)]
    if absence.waits is not None:
        parts[0] += _at(_place(facts))
        if absence.waits_for:
            parts[0] += f", for {ranks_text(absence.waits_for)}"
    elif facts is not None:
        parts[0] += _at_with_caller(facts)
    if absence.cause not in (Cause.DEAD, Cause.OUT_OF_MEMORY) and absence.waits is None:
        parts += _progress(member.board)
    if facts is not None and facts.workers:
        parts.append(_workers(facts))
    return "; ".join(parts)


def _doing(absence: Absence) -> str:
    member, facts = absence.member, absence.member.facts
    cause = absence.cause
    if member.answer and not member.note:
        return f"it is on another host; {member.answer.partition(' ')[2]}"
    if absence.waits is not None:
        return f"it waits in {describe_wait(absence.waits, member.board)}"
    if cause is Cause.ELSEWHERE:
        return f"it waits in {member.note}"
    if cause is Cause.EXITING:
        return "its script has ended, and Python is exiting"
    if cause is Cause.INTERRUPTED:
        return "it was interrupted (Ctrl-C, or a signal handler that has raised)"
    if cause is Cause.OUT_OF_MEMORY:
        return "it is dead, and the system has killed a process for want of memory"
    if cause is Cause.BUSY and facts is not None:
        return f"it computes ({100 * facts.cpu_share:.0f} % of a core)"
    if cause is Cause.NOT_SEEN:
        if not member.is_here:
            return "it is on another host, and has not answered what it does"
        return "it has not said what it does"
    state = facts.state.text if facts is not None else cause.value
    if cause is Cause.HOLDS_GIL:
        return f"{state}, in a call that holds Python's lock (the GIL)"
    return state


def answer_text(me: Member, now_ns: int) -> str:
    """Returns what this rank does, for a rank of another host that has asked.

    Args:
        me: what is known of this rank here.
        now_ns: the time by the clock of boards.

    Returns:
        The name of the :class:`fastddp.watch.stall.Cause`, a space, and what it does in words.
    """
    waits = waits_of(me.board)
    absence = Absence(me.rank, cause_of(me, now_ns), me, waits[0] if waits else None)
    steps = [f"{model.steps} steps done" for model in me.board.models[:1]] if me.board else []
    return "; ".join([f"{absence.cause.name} {_about(absence)}", *steps])


def _progress(board: Snapshot | None) -> Iterator[str]:
    """Yields what a model has come to, if a backward is under way."""
    if board is None:
        return
    filling = [model for model in board.models if model.phase == FILLING]
    for model in filling[:1]:
        name = names.of(model.owner, model.group).param(model.last_param)
        arrived = f", last gradient: {name}" if name else ", no gradient yet"
        yield f"in the backward of step {model.steps + 1}{arrived}"


def _workers(facts: Facts) -> str:
    states: dict[str, int] = {}
    for state in facts.workers:
        states[state.text] = states.get(state.text, 0) + 1
    text = ", ".join(f"{count} {state}" for state, count in states.items())
    count = len(facts.workers)
    return f"its {count} data loader worker{'s' if count > 1 else ''}: {text}"


# ---- places --------------------------------------------------------------------------------------


def _place(facts: Facts | None) -> Frame | None:
    return place_in_script(facts.frames) if facts is not None and facts.frames else None


def _at(place: Frame | None) -> str:
    return f", at {place}" if place is not None else ""


def _at_with_caller(facts: Facts) -> str:
    """Returns the place in the script, and the one in the script that it was called from."""
    place = _place(facts)
    if place is None:
        return ""
    text = f", at {place}"
    caller = caller_in_script(facts.frames)
    return f"{text}, called from {caller}" if caller is not None else text


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


# ---- what a wait that fails by itself says -------------------------------------------------------


def where(view: View, rank: int) -> str:
    """Returns what a rank waits in, as far as is known; empty if it does not wait."""
    member = view.members.get(rank)
    waits = waits_of(member.board) if member is not None else ()
    if waits:
        return describe_wait(waits[0], view.board(rank))
    return member.note if member is not None else ""


def missing_text(elsewhere: Mapping[int, str]) -> str:
    """Returns who is missing in a wait that has failed, for the text of the error.

    Args:
        elsewhere: the ranks that have not come, with what they wait in; empty for nothing.
    """
    parts = [f"rank {rank} waits in {what}" for rank, what in elsewhere.items() if what]
    unknown = [rank for rank, what in elsewhere.items() if not what]
    if unknown:
        parts.append(f"{ranks_text(unknown)} not there yet; do all ranks call it?")
    return "; ".join(parts)
