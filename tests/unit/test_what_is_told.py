"""What is told of a wait, and what is not."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import replace

import pytest

from fastddp.watch import board, groups, named, teller
from fastddp.watch.board import Board
from fastddp.watch.layout import Ending, Header, Source
from fastddp.watch.process import Kind, born
from fastddp.watch.sight import Sight
from fastddp.watch.teller import Teller
from fastddp.watch.timing import Timing
from fastddp.watch.view import Facts, Member, View
from tests.unit.boards import NET, STATE, WORLD, Rank, model, wait

STALL_S = 10.0
AT_BARRIER = Rank([wait(Source.SCRIPT, number=0, text="barrier")])


class NoSight(Sight):
    """Knows no more than what a view has."""

    def with_cpu(self, view: View, _: Collection[int]) -> View:
        return view

    def with_stacks(self, view: View, _: Collection[int]) -> View:
        return view


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    own = Board()
    own.put(Header.RANK, 0)
    monkeypatch.setattr(board, "_board", own)
    monkeypatch.setattr(named, "failed_ns", 0)
    yield own
    if own.fd >= 0:
        os.close(own.fd)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(teller, "say", said.extend)
    return said


def seen_by_rank_0(own: Board, *others: Rank) -> View:
    """Returns what rank 0, which has this board, knows of the other ranks."""
    now_ns = time.monotonic_ns()
    members = {0: Member(0, own.read(), Facts(STATE[Kind.RUNNING]))}
    for rank, other in enumerate(others, start=1):
        member = other.member(rank)
        if member.board is not None:
            member = replace(member, board=replace(member.board, seen_ns=now_ns))
        members[rank] = member
    return View(0, now_ns, {WORLD: tuple(members)}, members)


@pytest.mark.parametrize(
    ("other", "is_told"),
    [
        pytest.param(Rank(), True, id="one sleeps"),
        pytest.param(AT_BARRIER, False, id="all have called it"),
        pytest.param(Rank(cpu_share=1.0), False, id="one computes"),
    ],
)
def test_a_collective_of_the_script_is_told_if_a_rank_is_missing(
    other: Rank, is_told: bool, own: Board, said: list[str]
) -> None:
    own.begin_wait(Source.SCRIPT, "barrier", since_ns=1, group=WORLD)
    view = seen_by_rank_0(own, other)
    (mine,) = own.read().waits
    Teller(NoSight(), Timing(STALL_S)).tell(view, mine, STALL_S)
    assert bool(said) == is_told


@pytest.mark.parametrize(
    ("moved", "ending", "is_told"),
    [
        pytest.param(True, Ending.NO, True, id="it has come"),
        pytest.param(False, Ending.NO, False, id="a timeout"),
        pytest.param(True, Ending.INTERRUPTED, False, id="Ctrl-C here"),
    ],
)
def test_the_end_of_a_wait_is_told_if_the_others_came(
    moved: bool,
    ending: Ending,
    is_told: bool,
    own: Board,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = own.begin_wait(Source.BACKWARD, "a bucket", since_ns=1, group=WORLD, label=NET << 32)
    them = Rank(models=[model(steps=5)])
    view = seen_by_rank_0(own, them)
    board_ = view.board(1)
    assert board_ is not None
    here = replace(board_, pid=os.getpid(), born=born(os.getpid()) or 0)
    view = replace(view, members={**view.members, 1: replace(view.members[1], board=here)})
    later = replace(here, models=(model(steps=6),)) if moved else here
    monkeypatch.setattr(groups, "board_of", {1: later}.get)
    (mine,) = own.read().waits
    told = Teller(NoSight(), Timing(STALL_S))
    told.tell(view, mine, STALL_S)
    assert said
    said.clear()
    own.end_wait(place)
    own.put(Header.ENDING, ending)
    told.tell_ends(own.read(), view.now_ns)
    assert bool(said) == is_told
