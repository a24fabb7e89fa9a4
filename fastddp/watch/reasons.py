"""The likely cause of a stall, in one sentence, and what to do next."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fastddp.watch.frames import Frame, place_in_script
from fastddp.watch.layout import Source
from fastddp.watch.loops import is_after_loop_of
from fastddp.watch.snapshot import FILLING, WaitSeen
from fastddp.watch.stall import Absence, Cause, Stall
from fastddp.watch.view import View

_UNEVEN = "give all ranks as many batches, or see `join` for uneven inputs"

_REASONS: dict[Cause, tuple[str, str]] = {
    Cause.DEAD: (
        "rank {rank} has died",
        "look at the end of its output; the collective of the others will fail",
    ),
    Cause.OUT_OF_MEMORY: (
        "rank {rank} was killed because memory ran out",
        "use smaller batches, or fewer ranks or data loader workers on this host",
    ),
    Cause.STOPPED: (
        "rank {rank} was stopped from outside",
        "continue it with `kill -CONT`, or `fg`",
    ),
    Cause.DEBUGGED: ("somebody debugs rank {rank}", "let it go on"),
    Cause.EXITING: (
        "rank {rank} has ended its script, and the others have not",
        "look why it left early",
    ),
    Cause.INTERRUPTED: (
        "rank {rank} was interrupted, and did something else then",
        "end the other ranks too",
    ),
    Cause.ELSEWHERE: (
        "the ranks take different branches",
        "have all ranks call the same collectives in the same order",
    ),
    Cause.BUSY: (
        "rank {rank} has more work than the others: it compiles, evaluates or prepares data",
        "nothing, if that is meant; else give all ranks equal work",
    ),
    Cause.HOLDS_GIL: (
        "a call on rank {rank} does not return, and keeps its other Python threads from running",
        "look at the call in that line",
    ),
    Cause.INPUT: (
        "the input of rank {rank} is slow",
        "look at its data set and its storage; more `num_workers` or a larger `prefetch_factor`"
        " hide short pauses",
    ),
    Cause.SLEEPS: (
        "rank {rank} waits for something that is not a collective: a lock, a file, the network",
        "look at that line",
    ),
    Cause.NOT_SEEN: (
        "rank {rank} is slow, or does not call the same collectives",
        "look at its output",
    ),
}


def likely(stall: Stall, view: View, mine: Frame | None) -> str:
    """Returns the likely cause of a stall, and the next step; empty if nothing is known.

    Args:
        stall: what is known of the stall.
        view: what is known of the ranks.
        mine: the place in the script at which this rank waits, if it is known.
    """
    roots = stall.roots
    if not roots:
        apart = {a.rank: a.waits for a in stall.absences if a.waits is not None}
        reason, next_step = why_apart({stall.rank: stall.wait} | apart, view, {stall.rank: mine})
        return f"{reason}; next: {next_step}" if apart else ""
    first = roots[0]
    reason, next_step = _REASONS[first.cause]
    if first.cause is Cause.SLEEPS and _is_in_backward(first):
        reason = "rank {rank} is stuck in its backward"
    done = steps_done(view, first.rank, stall.wait)
    if first.cause is Cause.EXITING and done is not None:
        reason = f"rank {{rank}} left the training loop after step {done}: it has fewer batches"
        next_step = _UNEVEN
    return f"{reason.format(rank=first.rank)}; next: {next_step}"


def why_apart(
    stuck: Mapping[int, WaitSeen], view: View, places: Mapping[int, Frame | None]
) -> tuple[str, str]:
    """Returns how ranks have come into different collectives, and the next step.

    Args:
        stuck: the ranks, with what they wait in.
        view: what is known of the ranks.
        places: the places in the script, as far as they are known better than from the view.
    """
    in_step = {rank: wait for rank, wait in stuck.items() if wait.bucket is not None}
    if not in_step:
        in_step = {rank: wait for rank, wait in stuck.items() if _is_of_forward(wait)}
    others = {rank: wait for rank, wait in stuck.items() if rank not in in_step}
    if _are_of_different_models(stuck.values()):
        backwards = (
            "backwards of " if not others and all(w.bucket for w in in_step.values()) else ""
        )
        return (
            f"the ranks run {backwards}different models",
            "have all ranks take the same branches, in the same order",
        )
    if not in_step or not others:
        return _REASONS[Cause.ELSEWHERE]
    # Of ranks in one step, some may be in the forward, and others through with the broadcast in it.
    others = {r: wait for r, wait in others.items() if not _is_of_forward(wait)} or others
    here, there = min(in_step), min(others)
    wait = others[there]
    done = steps_done(view, there, in_step[here])
    after = f" after step {done}" if done is not None else ""
    if _is_of_forward(wait):
        return (
            f"rank {there} has begun another forward{after}, without the backward that rank {here}"
            " is in",
            "have all ranks call backward equally often",
        )
    place, loop = (places.get(rank) or _place(view, rank) for rank in (there, here))
    is_after = is_after_loop_of(place, loop) if place is not None and loop is not None else None
    if is_after:
        return f"rank {there} left the training loop{after}: it has fewer batches", _UNEVEN
    if is_after is None and wait.source is Source.SCRIPT:
        return (
            f"rank {there} has left the training loop{after}, or is alone in calling"
            f" {wait.text.split()[0]}",
            f"{_UNEVEN}; have all ranks call it equally often",
        )
    return (
        f"rank {there} is alone in calling {wait.text}{after}",
        "have all ranks call the same collectives in the same order",
    )


def steps_done(view: View, rank: int, wait: WaitSeen) -> int | None:
    """Returns how many steps a rank has done of the model of a wait; None if it is not known."""
    board = view.board(rank)
    model = board.model(wait.owner, wait.group) if board is not None and wait.owner else None
    return model.steps if model is not None else None


def _are_of_different_models(waits: Collection[WaitSeen]) -> bool:
    """Whether the waits inside of steps tell of more than one model; some know the group only."""
    backwards = {(wait.owner, wait.group) for wait in waits if wait.bucket is not None}
    forwards = {wait.group for wait in waits if _is_of_forward(wait)}
    return len(backwards) > 1 or len(forwards | {group for _, group in backwards}) > 1


def _is_of_forward(wait: WaitSeen) -> bool:
    return wait.text.endswith("before forward")


def _is_in_backward(absence: Absence) -> bool:
    board = absence.member.board
    return board is not None and any(model.phase == FILLING for model in board.models)


def _place(view: View, rank: int) -> Frame | None:
    facts = view.facts(rank)
    return place_in_script(facts.frames) if facts is not None and facts.frames else None
