"""The lines that tell of a stall, and the text of the error that ends a deadlock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastddp.watch import names
from fastddp.watch.describe import describe_wait
from fastddp.watch.frames import Frame, place_in_script
from fastddp.watch.layout import Source
from fastddp.watch.meeting_points import waits_of
from fastddp.watch.snapshot import FILLING, WaitSeen
from fastddp.watch.stall import Absence, Cause, Stall
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
    lines += _likely(stall, view)
    return lines


def end_line(stall: Stall, lasted_s: float) -> str:
    """Returns the line that tells that a stall is over.

    Args:
        stall: the stall, as it was told of last.
        lasted_s: for how many seconds the rank has waited in all.
    """
    last = [absence.rank for absence in stall.roots or stall.absences]
    came = f"; {ranks_text(last)} came last" if last else ""
    return f"fastddp: rank {stall.rank} goes on after {_seconds(lasted_s)} of waiting{came}"


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
    return (
        "the ranks wait for each other in different collectives, and none of them can go on:"
        f" {sides}. {_why_different(stuck, view)} FASTDDP_STALL=warn leaves them waiting"
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
        yield f"  {ranks_text(ranks)} {'have' if len(ranks) > 1 else 'has'} not come: {text}"


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
        parts += _progress(member)
    if facts is not None and facts.workers:
        parts.append(_workers(facts))
    return "; ".join(parts)


def _doing(absence: Absence) -> str:
    member, facts = absence.member, absence.member.facts
    cause = absence.cause
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
            return "it is on another host, and in nothing that fastddp knows of"
        return "it has not said what it does"
    state = facts.state.text if facts is not None else cause.value
    if cause is Cause.HOLDS_GIL:
        return f"{state}, in a call that holds Python's lock (the GIL)"
    return state


def _progress(member: Member) -> Iterator[str]:
    """Yields what its model has come to, if a backward is under way there."""
    board = member.board
    if board is None:
        return
    filling = [model for model in board.models if model.phase == FILLING]
    for model in filling[:1]:
        name = names.of(model.owner).param(model.last_param)
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
    """Returns the place in the script, and the one that it was called from if that is another file.

    The place of a data loader is in the code of the data set; what the reader looks for is the loop.
    """
    place = _place(facts)
    if place is None:
        return ""
    text = f", at {place}"
    outer = place_in_script(facts.frames[::-1])
    if outer is not None and (outer.file, outer.function) != (place.file, place.function):
        text += f", called from {outer}"
    return text


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


# ---- why, and what to do -------------------------------------------------------------------------


def _likely(stall: Stall, view: View) -> Iterator[str]:
    roots = stall.roots
    if not roots:
        if any(absence.waits is not None for absence in stall.absences):
            stuck = {stall.rank: stall.wait} | {a.rank: a.waits for a in stall.absences if a.waits}
            yield f"  likely: {_why_different(stuck, view)}"
        return
    first = roots[0]
    reason, next_step = _REASONS[first.cause]
    if first.cause is Cause.SLEEPS and _is_filling(first.member):
        reason, next_step = _REASONS_IN_BACKWARD
    left = _has_left_loop(stall, first, view)
    if first.cause in (Cause.EXITING, Cause.SLEEPS) and left:
        reason, next_step = left, _JOIN
    yield f"  likely: {reason.format(rank=first.rank)}; next: {next_step}"


_JOIN = (
    "give every rank as many batches, or wrap the loop in `with model.join():` for uneven inputs"
)
_REASONS_IN_BACKWARD = (
    "rank {rank} is stuck in its backward",
    "look at that line of the script, or at the hook or function that backward has called",
)
_REASONS: dict[Cause, tuple[str, str]] = {
    Cause.DEAD: (
        "rank {rank} has died",
        "look at the end of its output; the others' collective fails soon",
    ),
    Cause.OUT_OF_MEMORY: (
        "rank {rank} was killed because memory ran out",
        "use smaller batches, fewer ranks or fewer data loader workers",
    ),
    Cause.STOPPED: (
        "rank {rank} was stopped from outside",
        "continue it with `kill -CONT`, or `fg`",
    ),
    Cause.DEBUGGED: ("somebody debugs rank {rank}", "let it go on"),
    Cause.EXITING: (
        "rank {rank} has ended its script, the others have not",
        "look whether it had fewer batches, or has left early",
    ),
    Cause.INTERRUPTED: ("rank {rank} was interrupted", "end the other ranks too"),
    Cause.ELSEWHERE: (
        "the ranks take different branches",
        "have all ranks call the same collectives in the same order",
    ),
    Cause.BUSY: (
        "rank {rank} has more work than the others: it compiles, evaluates or prepares data",
        "nothing, if that is meant; else give all ranks equal work",
    ),
    Cause.HOLDS_GIL: (
        "a library call on rank {rank} does not return and keeps Python's other threads from"
        " running",
        "look at the call in that line",
    ),
    Cause.INPUT: (
        "the input of rank {rank} is slow",
        "look at its data set and storage; more `num_workers`, or a longer `prefetch_factor`, hide"
        " pauses",
    ),
    Cause.SLEEPS: (
        "rank {rank} waits for something that is not a collective: a lock, a file, the network, a"
        " sleep",
        "look at that line of the script",
    ),
    Cause.NOT_SEEN: (
        "rank {rank} is slow, or does not call the same collectives",
        "look at its output; do all ranks call this?",
    ),
}


def _is_filling(member: Member) -> bool:
    return member.board is not None and any(m.phase == FILLING for m in member.board.models)


def _has_left_loop(stall: Stall, absence: Absence, view: View) -> str:
    """Returns the reason if a rank's model has done as many steps, and will do no more."""
    model, theirs = (
        board.model(stall.wait.owner) if board is not None else None
        for board in (view.board(stall.rank), absence.member.board)
    )
    if model is None or theirs is None or theirs.phase == FILLING:
        return ""
    if absence.cause is Cause.EXITING:
        return (
            "rank {rank} left the training loop"
            + f" after step {theirs.steps}: it has fewer batches"
        )
    return ""


def _why_different(stuck: Mapping[int, WaitSeen], view: View) -> str:
    """Returns a sentence on how ranks come into different collectives, and what to do."""
    in_backward = {r: w for r, w in stuck.items() if w.bucket is not None}
    in_script = {r: w for r, w in stuck.items() if w.source is Source.SCRIPT}
    owners = {wait.owner for wait in in_backward.values()}
    if in_backward and in_script:
        there, here = min(in_script), min(in_backward)
        done = _steps_done(view, there, in_backward[here].owner)
        after = f" after step {done}" if done is not None else ""
        return (
            f"Rank {there} has gone on to {in_script[there].text}{after}, which rank {here} has not"
            f" reached: rank {there} left the training loop early because it has fewer batches"
            " (see `join` for uneven inputs), skipped a backward, or is alone in calling that."
        )
    if len(owners) > 1:
        return (
            "The ranks run the backwards of different models: have all ranks take the same"
            " branches, in the same order."
        )
    return "Have all ranks call the same collectives, in the same order, on all groups."


def _steps_done(view: View, rank: int, owner: int) -> int | None:
    board = view.board(rank)
    model = board.model(owner) if board is not None else None
    return model.steps if model is not None else None


def missing_text(view: View, wait: WaitSeen, absent: Sequence[int]) -> str:
    """Returns who is missing in a wait that has failed, for the text of the error.

    Args:
        view: what is known of the ranks.
        wait: what this rank waits in.
        absent: the ranks that have not come.
    """
    parts, unknown = [], []
    for rank in absent:
        member = view.members.get(rank)
        waits = waits_of(member.board) if member is not None else ()
        note = member.note if member is not None else ""
        if waits or note:
            what = describe_wait(waits[0], view.board(rank)) if waits else note
            parts.append(f"rank {rank} waits in {what}")
        else:
            unknown.append(rank)
    if unknown:
        parts.append(f"{ranks_text(unknown)} not there yet; do all ranks call it?")
    return "; ".join(parts)
