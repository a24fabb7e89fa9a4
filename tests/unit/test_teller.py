"""When people are told of a stall."""

from __future__ import annotations

from typing import Any

import pytest

from fastddp.watch import teller
from fastddp.watch.meeting_points import waits_of
from fastddp.watch.teller import Teller
from fastddp.watch.timing import Timing
from tests.unit.boards import Rank, view, wait

STALL_S = 10.0


class Sight:
    """Knows nothing more than the view."""

    def with_cpu(self, seen: Any, _: Any) -> Any:
        return seen

    with_stacks = with_cpu


class Mine:
    """The board of this process, on which there is a wait."""

    def read(self) -> Any:
        return view(ALONE).board(0)


ALONE = Rank([wait(bucket=1, missing=[1])])
THERE = Rank([wait(bucket=1)])
SLEEPS = Rank()
COMES = Rank(known_s=1.0)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([(SLEEPS, 9.0)], 0),
        ([(SLEEPS, 11.0)], 1),
        ([(SLEEPS, 11.0), (SLEEPS, 12.0), (SLEEPS, 21.0)], 2),
        # It has begun just now: what it has done before is not known.
        ([(COMES, 11.0), (COMES, 29.0)], 0),
        ([(COMES, 11.0), (COMES, 31.0)], 1),
        ([(COMES, 11.0), (SLEEPS, 17.0)], 1),
        # Nobody is missing any more: the collective is about to end, or its transport is stuck.
        ([(THERE, 11.0), (THERE, 20.0)], 0),
        ([(THERE, 11.0), (THERE, 22.0)], 1),
        ([(THERE, 11.0), (SLEEPS, 12.0), (THERE, 22.0)], 1),
    ],
)
def test_how_often_a_stall_is_told(
    others: list[tuple[Rank, float]], told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr(teller, "say", said.append)
    monkeypatch.setattr(teller.board, "own", Mine)
    telling = Teller(Sight(), Timing(STALL_S))  # type: ignore[arg-type]
    for other, observed_s in others:
        first = THERE if other is THERE else ALONE
        seen = view(first, other)
        telling.tell(seen, waits_of(seen.board(0))[0], observed_s)
    assert len(said) == told
