"""Which ranks can never move: a pure function of what is known of them.

A collective needs all of its ranks, and a process that begins all of its collectives in one thread,
and waits in one of them, begins no other before that is over. So ranks that wait only for each
other's, in different collectives, wait for ever.
"""

from __future__ import annotations

from fastddp.watch.layout import Ending, Source
from fastddp.watch.meeting_points import BITS, absent_from, are_one, waits_of
from fastddp.watch.process import Kind
from fastddp.watch.snapshot import Snapshot, WaitSeen
from fastddp.watch.view import View

FRESH_NS = 3_000_000_000
"""A process of which the watcher has run within that time is alive and not stopped."""


def deadlock(view: View, stalled_ns: int) -> dict[int, WaitSeen]:
    """Returns the ranks that can never move, with what they wait in; none where that is not sure.

    Only those are returned of which every rank that they wait for is among them. So nothing is sure
    as long as one of these sleeps, computes, is stopped or is on another host: what it does next is
    not known, and neither is whether the others' collectives had its part already.

    Args:
        view: what is known of the ranks.
        stalled_ns: how long each wait must have lasted.
    """
    stuck = {
        rank: wait
        for rank in view.members
        if (wait := _only_wait(view, rank)) is not None
        and view.now_ns - wait.since_ns >= stalled_ns
    }
    while True:
        free = [rank for rank, wait in stuck.items() if not _waits_within(view, rank, wait, stuck)]
        if not free:
            return stuck
        for rank in free:
            del stuck[rank]


def _only_wait(view: View, rank: int) -> WaitSeen | None:
    """Returns what a rank waits in, if it can do nothing else."""
    board, facts = view.board(rank), view.facts(rank)
    if board is None or board.hand_overs or board.has_script_threads:
        return None
    if board.ending is Ending.EXITING:
        return None
    if view.now_ns - board.seen_ns > FRESH_NS:
        return None
    if facts is not None and facts.state.kind in (Kind.STOPPED, Kind.TRACED, Kind.GONE):
        return None
    waits = waits_of(board)
    if len(waits) != 1 or not _is_of_issuer(board):
        return None
    return waits[0]


def _is_of_issuer(board: Snapshot) -> bool:
    """Returns whether the thread that begins the collectives waits, the main one if none has."""
    issuer = board.issuer or board.pid
    return any(wait.thread == issuer for wait in board.waits)


def _waits_within(view: View, rank: int, wait: WaitSeen, stuck: dict[int, WaitSeen]) -> bool:
    if wait.unfinished:
        return False  # these have come, and may be slow
    if wait.missing and len(view.groups.get(wait.group, ())) > BITS:
        return False  # it has bits for some of the ranks only
    absent = absent_from(view, rank, wait)
    return bool(absent) and all(
        other in stuck
        and other != rank
        and not are_one(wait, stuck[other])
        and _has_not_begun(view, rank, wait, other, stuck[other])
        for other in absent
    )


def _has_not_begun(view: View, rank: int, wait: WaitSeen, other: int, theirs: WaitSeen) -> bool:
    """Returns whether another rank has for certain not begun what a rank waits in.

    It might have begun it without waiting for it, and the transfer be slow: so it must have begun
    no more in the group, before what it waits in now, than this rank has before this wait. In
    shared memory the bits of the wait say it.
    """
    if wait.source is Source.SHM:
        return bool(wait.missing)
    begun = _begun_before(view, other, theirs, wait.group)
    mine = _begun_before(view, rank, wait, wait.group)
    return begun is not None and mine is not None and begun <= mine


def _begun_before(view: View, rank: int, wait: WaitSeen, group: int) -> int | None:
    """Returns how many collectives a rank had begun in a group before those that it waits for."""
    board = view.board(rank)
    sequence = board.sequence(group) if board is not None else None
    # The counterpart of a group in shared memory has its name, but another count.
    if board is None or sequence is None or wait.group != group or wait.source is Source.SHM:
        return sequence
    model = board.model(wait.owner, group) if wait.source is Source.BACKWARD else None
    return sequence - max(1, model.launched if model is not None else 1)
