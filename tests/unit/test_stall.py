"""Who is missing, what they do instead, and who tells: by hand-made boards."""

from __future__ import annotations

import pytest

from fastddp.watch.frames import Frame
from fastddp.watch.layout import Ending, Source, id_of
from fastddp.watch.meeting_points import absent_from, together_with, waits_of
from fastddp.watch.process import Kind, State
from fastddp.watch.snapshot import WaitSeen
from fastddp.watch.stall import Cause, Stall, judge, speaks
from tests.unit.boards import (
    AT_LOADER,
    STATE,
    WAITED_S,
    WORLD,
    Rank,
    model,
    view,
    wait,
)

A, B = id_of("a"), id_of("b")
WAITING = Rank([wait(bucket=1, missing=[1])], [model(steps=5, phase=1)])
BARRIER = wait(Source.SCRIPT, number=0, text="barrier on group '0'")
STALLED_NS = 10_000_000_000


def judged(*others: Rank, first: Rank = WAITING) -> Stall:
    seen = view(first, *others)
    return judge(seen, 0, waits_of(seen.board(0))[0], WAITED_S)


@pytest.mark.parametrize(
    ("rank", "cause"),
    [
        pytest.param(Rank(frames=AT_LOADER), Cause.INPUT, id="sleep in the loader"),
        pytest.param(Rank(), Cause.SLEEPS, id="sleep elsewhere"),
        pytest.param(Rank(state=STATE[Kind.DISK]), Cause.SLEEPS, id="disk"),
        pytest.param(Rank(state=STATE[Kind.STOPPED]), Cause.STOPPED, id="SIGSTOP"),
        pytest.param(Rank(state=STATE[Kind.GONE]), Cause.DEAD, id="SIGKILL"),
        pytest.param(Rank(state=State(Kind.ZOMBIE, "", 1)), Cause.DEAD, id="exception"),
        pytest.param(
            Rank(state=State(Kind.ZOMBIE, "", -9), killed_for_memory=True),
            Cause.OUT_OF_MEMORY,
            id="out of memory",
        ),
        pytest.param(Rank(ending=Ending.EXITING), Cause.EXITING, id="early exit"),
        pytest.param(Rank(ending=Ending.INTERRUPTED), Cause.INTERRUPTED, id="Ctrl-C"),
        pytest.param(
            Rank(ending=Ending.INTERRUPTED, cpu_share=0.9), Cause.BUSY, id="Ctrl-C, then busy"
        ),
        pytest.param(
            Rank(
                ending=Ending.INTERRUPTED,
                frames=[Frame("/usr/lib/python3.11/pdb.py", 9, "interaction")],
            ),
            Cause.DEBUGGED,
            id="Ctrl-C, then a breakpoint",
        ),
        pytest.param(Rank([BARRIER], [model(steps=5)]), Cause.ELSEWHERE, id="extra collective"),
        pytest.param(
            Rank([wait(Source.NAMED, number=0, text="the broadcast before forward")]),
            Cause.ELSEWHERE,
            id="missing backward",
        ),
        pytest.param(
            Rank([wait(bucket=1, owner=8, missing=[0])]), Cause.ELSEWHERE, id="different branch"
        ),
        pytest.param(Rank(seen_s_ago=11.0), Cause.HOLDS_GIL, id="GIL held"),
        pytest.param(Rank(cpu_share=0.9, seen_s_ago=11.0), Cause.BUSY, id="busy compile"),
        pytest.param(Rank(cpu_share=0.3), Cause.BUSY, id="slow rank"),
        pytest.param(
            Rank(frames=[Frame("/usr/lib/python3.11/pdb.py", 9, "interaction")]),
            Cause.DEBUGGED,
            id="breakpoint",
        ),
        pytest.param(Rank(state=STATE[Kind.TRACED]), Cause.DEBUGGED, id="debugger"),
        pytest.param(Rank(has_board=False, is_here=False), Cause.NOT_SEEN, id="another host"),
        pytest.param(
            Rank(has_board=False, is_here=False, note="a call"), Cause.ELSEWHERE, id="a note"
        ),
    ],
)
def test_what_a_missing_rank_does(rank: Rank, cause: Cause) -> None:
    stall = judged(rank)
    (absence,) = stall.absences
    assert (absence.rank, absence.cause) == (1, cause)
    assert stall.is_busy == (cause is Cause.BUSY)
    assert stall.is_debugged == (cause is Cause.DEBUGGED)


def test_a_busy_rank_does_not_excuse_a_stopped_one() -> None:
    first = Rank([wait(bucket=1, missing=[1, 2])])
    assert not judged(Rank(cpu_share=1.0), Rank(state=STATE[Kind.STOPPED]), first=first).is_busy


def test_the_ranks_that_a_missing_one_waits_for_are_judged_too() -> None:
    first = Rank([wait(group=A, missing=[1])])
    second = Rank([wait(group=B, missing=[1])])  # rank 1 of the group is rank 2
    seen = view(first, second, Rank(state=STATE[Kind.STOPPED]), groups={A: [0, 1], B: [1, 2]})
    stall = judge(seen, 0, waits_of(seen.board(0))[0], WAITED_S)
    assert [(a.rank, a.cause, a.waits_for) for a in stall.absences] == [
        (1, Cause.ELSEWHERE, (2,)),
        (2, Cause.STOPPED, ()),
    ]
    assert [root.rank for root in stall.roots] == [2]


# ---- who is missing ------------------------------------------------------------------------------


def missing(first: WaitSeen, *others: Rank) -> tuple[tuple[int, ...], tuple[int, ...]]:
    seen = view(Rank([first]), *others)
    (mine,) = waits_of(seen.board(0))
    return absent_from(seen, 0, mine), together_with(seen, 0, mine)


def test_the_bits_of_a_wait_say_who_is_missing() -> None:
    with_me = Rank([wait(missing=[1])])
    assert missing(wait(missing=[1]), Rank(), with_me) == ((1,), (2,))
    assert missing(wait(unfinished=[2]), Rank(), Rank()) == ((2,), ())


@pytest.mark.parametrize(
    ("mine", "theirs", "are_one"),
    [
        (BARRIER, BARRIER, True),
        (BARRIER, wait(Source.SCRIPT, number=0, text="all_reduce on group '0'"), False),
        (BARRIER, wait(Source.SCRIPT, number=0, group=A, text=BARRIER.text), False),
        (BARRIER, wait(Source.NAMED, number=0, text=BARRIER.text), False),
        (
            wait(Source.BACKWARD, number=0, bucket=1),
            wait(Source.BACKWARD, number=0, bucket=3),
            True,
        ),
        (
            wait(Source.BACKWARD, number=0, bucket=1),
            wait(Source.BACKWARD, number=0, bucket=1, owner=8),
            False,
        ),
        (wait(number=3), wait(number=3, text="otherwise"), True),
        (wait(number=3), wait(number=4), False),
    ],
)
def test_without_bits_the_other_boards_do(mine: WaitSeen, theirs: WaitSeen, are_one: bool) -> None:
    assert missing(mine, Rank([theirs])) == (((), (1,)) if are_one else ((1,), ()))


def test_notes_stand_in_for_boards_of_other_hosts() -> None:
    mine = wait(Source.NAMED, number=0, text="the first")
    there = Rank(has_board=False, is_here=False, note="the first")
    elsewhere = Rank(has_board=False, is_here=False, note="the second")
    nowhere = Rank(has_board=False, is_here=False)
    assert missing(mine, there, elsewhere, nowhere) == ((2, 3), (1,))


def test_waits_of_one_thread_are_one() -> None:
    named = wait(Source.NAMED, number=0, text="join: the count", place=16)
    inner = wait(number=3, missing=[1], text="collective 3", place=0)
    own = wait(Source.OWN_THREAD, group=0, number=0, place=1)
    worker = wait(number=4, missing=[1], thread=77, place=2)
    (both,) = waits_of(view(Rank([named, inner])).board(0))
    assert (both.number, both.missing, both.text, both.place) == (3, 2, "join: the count", 0)
    assert [w.number for w in waits_of(view(Rank([own, worker])).board(0))] == [4]
    assert [w.source for w in waits_of(view(Rank([own])).board(0))] == [Source.OWN_THREAD]
    (both,) = waits_of(view(Rank([own, named, worker])).board(0))
    assert (both.number, both.text, both.place) == (4, "join: the count", 2)


# ---- who tells -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "tells"),
    [
        pytest.param(WAITING, False, id="it tells"),
        pytest.param(Rank(WAITING.waits, state=STATE[Kind.STOPPED]), True, id="stopped"),
        pytest.param(Rank(WAITING.waits, state=STATE[Kind.GONE]), True, id="dead"),
        pytest.param(Rank(WAITING.waits, seen_s_ago=5.0), True, id="its watcher does not run"),
        pytest.param(Rank([wait(bucket=1, missing=[1], waited_s=1.0)]), True, id="just come"),
        pytest.param(Rank([wait(group=A, missing=[1])]), True, id="in a stall of its own"),
        pytest.param(Rank(), True, id="does not wait"),
    ],
)
def test_the_lowest_rank_that_can_tells(lower: Rank, tells: bool) -> None:
    me = Rank([wait(bucket=1, missing=[1])])
    groups = {WORLD: [0, 1, 2], A: [0, 3]}
    assert speaks(view(lower, Rank(), me, Rank(), me=2, groups=groups), STALLED_NS) is tells


def test_of_two_ranks_that_wait_for_each_other_the_lower_one_tells() -> None:
    ranks = [WAITING, Rank([BARRIER])]
    assert [speaks(view(*ranks, me=me), STALLED_NS) for me in (0, 1)] == [True, False]
