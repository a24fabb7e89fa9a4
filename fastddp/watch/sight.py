"""How this process comes to know of the others: by their boards, by ``/proc``, and by asking."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from fastddp.watch import groups
from fastddp.watch.board import own as own_board
from fastddp.watch.deadlock import FRESH_NS
from fastddp.watch.frames import Frame, own
from fastddp.watch.groups import Watched
from fastddp.watch.layout import Header
from fastddp.watch.out_of_memory import out_of_memory_kills
from fastddp.watch.process import Kind, State, cpu_s_of_tree, loader_workers, state_of
from fastddp.watch.snapshot import Snapshot
from fastddp.watch.stack import ask
from fastddp.watch.view import Facts, Member, View

_PATIENCE_S = 1.5
"""For the answer of a watcher that looks once per second."""
_GLANCE_S = 0.25


class Sight:
    """Looks at other processes. What costs much is done for the ranks that it is asked for."""

    def __init__(self) -> None:
        self._cpu_s: dict[int, tuple[int, float]] = {}  # of ranks: when, and how much by then
        self._kills = out_of_memory_kills() or 0

    def view(self, watched: Sequence[Watched], mine: Snapshot, now_ns: int) -> View:
        """Returns what is known of the ranks of some groups, without their stacks.

        Args:
            watched: the groups that the script has.
            mine: what the board of this process says, with its rank.
            now_ns: the time by the clock of boards.
        """
        assert mine.rank is not None
        members = {mine.rank: Member(mine.rank, mine, Facts(State(Kind.RUNNING)))}
        for group in watched:
            for index, rank in enumerate(group.ranks):
                known = members.get(rank)
                if known is not None and (known.board or known.note):
                    continue
                member = _member(group, index, rank)
                if member is not None:
                    members[rank] = member
        return View(mine.rank, now_ns, {group.id: group.ranks for group in watched}, members)

    def begin(self) -> None:
        """Begins to count anew what processes use of the processor."""
        self._cpu_s.clear()

    def count(self, view: View, ranks: Collection[int]) -> None:
        """Counts from now on what the processes of some ranks use, if it does not yet."""
        for rank in ranks:
            board = view.board(rank)
            if rank not in self._cpu_s and board is not None:
                self._cpu_s[rank] = view.now_ns, cpu_s_of_tree(board.pid)

    def with_cpu(self, view: View, ranks: Collection[int]) -> View:
        """Returns a view in which is also what the processes of some ranks have used."""
        members = dict(view.members)
        killed = (out_of_memory_kills() or 0) > self._kills
        for rank, board, facts in _known(view, ranks):
            since_ns, before_s = self._cpu_s.get(rank, (view.now_ns, 0.0))
            elapsed_s = (time.monotonic_ns() - since_ns) / 1e9
            used_s = cpu_s_of_tree(board.pid) - before_s
            share = used_s / elapsed_s if since_ns < view.now_ns else 0.0
            seen = replace(facts, cpu_share=share, known_s=elapsed_s, killed_for_memory=killed)
            members[rank] = replace(members[rank], facts=seen)
        return replace(view, members=members)

    def with_stacks(self, view: View, ranks: Collection[int]) -> View:
        """Returns a view in which are also the stacks of some ranks, and their loaders' workers."""
        members = dict(view.members)
        for rank, board, facts in _known(view, ranks):
            frames = own() if rank == view.me else _stack_of(board)
            _say_that_this_process_runs()
            workers = tuple(state for _, state in loader_workers(board.pid))
            seen = replace(facts, frames=tuple(frames), workers=workers)
            members[rank] = replace(members[rank], facts=seen)
        return replace(view, members=members)


def look_at_me(mine: Snapshot) -> Member:
    """Returns what other processes of this host see of this one. Takes a quarter of a second.

    Args:
        mine: what the board of this process says.
    """
    pid, began = os.getpid(), time.monotonic()
    used_s = -cpu_s_of_tree(pid)
    time.sleep(_GLANCE_S)
    used_s += cpu_s_of_tree(pid)
    share = used_s / (time.monotonic() - began)
    workers = tuple(state for _, state in loader_workers(pid))
    state = state_of(pid, mine.born)
    facts = Facts(state, cpu_share=share, frames=tuple(own()), workers=workers)
    return Member(mine.rank or 0, mine, facts)


def _known(view: View, ranks: Collection[int]) -> Iterator[tuple[int, Snapshot, Facts]]:
    for rank in ranks:
        board, facts = view.board(rank), view.facts(rank)
        if board is not None and facts is not None:
            yield rank, board, facts


def _member(group: Watched, index: int, rank: int) -> Member | None:
    address = group.addresses.get(rank)
    note = group.notes.others.get(index, "")
    answer = group.questions.answers.get(index, "")
    if address is None:
        return Member(rank, note=note) if note else None
    if not groups.is_here(address):
        return Member(rank, note=note, answer=answer, is_here=False)
    seen = groups.peer(address).read()
    state = state_of(address.pid, address.born)
    if state.kind is Kind.GONE:  # or the store is older than this job, and there is a new address
        group.addresses.pop(rank, None)
    return Member(rank, seen, Facts(state), note)


def _say_that_this_process_runs() -> None:
    """Asking many ranks takes longer than the others would believe without a word."""
    board = own_board()
    if board is not None:
        board.put(Header.SEEN, time.monotonic_ns())


def _stack_of(them: Snapshot) -> list[Frame]:
    signal, fd = them.stack_signal, them.stack_file
    if not signal:
        return []
    watched = time.monotonic_ns() - them.seen_ns <= FRESH_NS
    return ask(them.pid, them.born, signal, fd, watched=watched, patience_s=_PATIENCE_S)
