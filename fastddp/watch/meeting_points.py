"""Which collective a rank waits in, and who has not come to it: pure functions of boards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fastddp.watch.describe import describe_wait
from fastddp.watch.layout import Source
from fastddp.watch.snapshot import Snapshot, WaitSeen
from fastddp.watch.view import View

BITS = 64
"""Of a group, so many ranks have a bit in a wait."""

# Of the waits of one thread, which lie inside of each other, the one that knows most counts.
_KNOWS = {
    Source.SHM: 0,
    Source.BACKWARD: 1,
    Source.OWN_THREAD: 2,
    Source.NAMED: 3,
    Source.SCRIPT: 4,
}


def waits_of(board: Snapshot | None) -> tuple[WaitSeen, ...]:
    """Returns what a process waits in, one wait for each thread, the longest first.

    A wait that is named contains another one if the collective is in shared memory: they count as
    one, which has the words of the inner one and the name. So does a wait for another thread of the
    process's own, and what that thread waits in.
    """
    if board is None:
        return ()
    by_thread: dict[int, list[WaitSeen]] = {}
    for wait in board.waits:
        by_thread.setdefault(wait.thread, []).append(wait)
    for_own: list[WaitSeen] = []
    others: list[list[WaitSeen]] = []
    for waits in by_thread.values():
        if any(wait.source is Source.OWN_THREAD for wait in waits):
            for_own += waits
        else:
            others.append(waits)
    if for_own and others:
        oldest = min(others, key=lambda waits: waits[0].since_ns)
        oldest += [wait for wait in for_own if wait.source is Source.NAMED]
    elif for_own:
        others = [for_own]
    return tuple(sorted(map(_merged, others), key=lambda wait: wait.since_ns))


def _merged(waits: list[WaitSeen]) -> WaitSeen:
    inner = min(waits, key=lambda wait: _KNOWS[wait.source])
    named = next((wait for wait in waits if wait.source is Source.NAMED), inner)
    if inner.source is Source.OWN_THREAD:
        return named
    return replace(inner, text=named.text) if inner.bucket is None else inner


def are_one(a: WaitSeen, b: WaitSeen) -> bool:
    """Returns whether two ranks wait in the same collective, as far as their boards tell."""
    if a.group != b.group or a.group == 0 or a.source is not b.source:
        return False
    if a.source is Source.BACKWARD:
        # All buckets of a round are launched before the first of them is waited for.
        return a.owner == b.owner
    if a.number and b.number:
        return a.number == b.number
    return a.text == b.text


def absent_from(view: View, rank: int, wait: WaitSeen) -> tuple[int, ...]:
    """Returns the ranks that have not come to what a rank waits in, or have not done their part.

    Args:
        view: what is known of the ranks.
        rank: the rank that waits, in the default group.
        wait: what the rank waits in. It says who is missing, else the boards of the others do.
    """
    ranks = view.groups.get(wait.group, ())
    bits = wait.missing | wait.unfinished
    if bits:
        return tuple(other for i, other in enumerate(ranks[:BITS]) if bits >> i & 1)
    return tuple(r for r in ranks if r != rank and not _is_in(view, r, wait))


def _is_in(view: View, rank: int, wait: WaitSeen) -> bool:
    member = view.members.get(rank)
    if member is not None and member.board is None and member.note:
        return describe_wait(wait, view.board(view.me)).startswith(member.note)
    return any(are_one(wait, other) for other in waits_of(view.board(rank)))


def together_with(view: View, rank: int, wait: WaitSeen) -> tuple[int, ...]:
    """Returns the other ranks that wait in the same collective."""
    ranks = view.groups.get(wait.group, ())
    absent = absent_from(view, rank, wait)
    return tuple(r for r in ranks if r != rank and r not in absent and _is_in(view, r, wait))


def reached_from(view: View, ranks: Iterable[int]) -> set[int]:
    """Returns these ranks, those that they wait for, those that those wait for, and so on."""
    seen: set[int] = set()
    todo = list(ranks)
    while todo:
        rank = todo.pop()
        if rank in seen:
            continue
        seen.add(rank)
        for wait in waits_of(view.board(rank)):
            todo += absent_from(view, rank, wait)
    return seen


def bound_together(view: View, rank: int) -> set[int]:
    """Returns the ranks that a rank waits for or with, in either direction and by any way."""
    near: dict[int, set[int]] = {}
    for other in view.members:
        for wait in waits_of(view.board(other)):
            for third in (*absent_from(view, other, wait), *together_with(view, other, wait)):
                near.setdefault(other, set()).add(third)
                near.setdefault(third, set()).add(other)
    seen: set[int] = set()
    todo = [rank]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += near.get(one, ())
    return seen
