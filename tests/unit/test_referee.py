"""A deadlock is ended once, or told once where the wait cannot be ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastddp.watch import referee
from fastddp.watch.board import Board
from fastddp.watch.layout import Header, Source
from fastddp.watch.referee import Referee
from fastddp.watch.sight import Sight
from fastddp.watch.snapshot import WaitSeen
from fastddp.watch.timing import Timing
from fastddp.watch.view import Facts, Member, View
from tests.unit.boards import STATE, WORLD, Kind, Rank, wait

LOOKS = 8


@pytest.fixture
def own() -> Iterator[Board]:
    own = Board()
    own.put(Header.RANK, 0)
    yield own
    if own.fd >= 0:
        os.close(own.fd)


def ranks_in_two(own: Board) -> View:
    """Returns what rank 0 sees: itself in one collective, and rank 1 in another one, for long."""
    now_ns = time.monotonic_ns()
    mine = own.read()
    them = Rank([wait(Source.SCRIPT, number=0, text="all_reduce")]).member(1)
    assert them.board is not None
    board = replace(
        them.board,
        seen_ns=now_ns,
        deadlock_ns=1,
        waits=tuple(replace(w, since_ns=1) for w in them.board.waits),
    )
    counts = ((WORLD, 1),)
    board = replace(board, sequences=counts)
    members = {
        0: Member(
            0, replace(mine, issuer=os.getpid(), sequences=counts), Facts(STATE[Kind.RUNNING])
        ),
        1: Member(1, board, Facts(STATE[Kind.SLEEPING])),
    }
    return View(0, now_ns, {WORLD: (0, 1)}, members)


@pytest.mark.parametrize(("source", "is_ordered"), [(Source.SCRIPT, False), (Source.NAMED, True)])
def test_a_wait_that_cannot_be_ended_is_told_once(
    source: Source, is_ordered: bool, own: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(referee, "say", said.extend)
    monkeypatch.setattr(referee, "_ALL_KNOW_NS", 0)
    monkeypatch.setattr(referee, "_FAILS_NS", 0)
    place = own.begin_wait(source, "barrier", since_ns=1, group=WORLD, thread=os.getpid())
    judge = Referee(own, Sight(), Timing(1.0))
    failed: list[WaitSeen] = []
    for _ in range(LOOKS):
        if (wait_ := judge.end_deadlock(ranks_in_two(own), 0.5)) is not None:
            failed.append(wait_)
    assert len(failed) == is_ordered
    assert bool(own.order_of(place)) == is_ordered
    assert len(said) == 1
    assert "can ever go on" in said[0]
    judge.forget()
    assert own.read().deadlock_ns == 0


def test_waits_that_are_old_after_a_suspension_are_not_sure(own: Board) -> None:
    own.begin_wait(Source.NAMED, "barrier", since_ns=1, group=WORLD, thread=os.getpid())
    judge = Referee(own, Sight(), Timing(10.0))
    for _ in range(9):
        assert judge.end_deadlock(ranks_in_two(own), 1.0) is None
        assert own.read().deadlock_ns == 0
    judge.end_deadlock(ranks_in_two(own), 1.0)
    assert own.read().deadlock_ns > 0
