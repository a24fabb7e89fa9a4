"""Which ranks can never move: certain ones only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from fastddp.watch.deadlock import deadlock
from fastddp.watch.layout import Ending, Source, id_of
from fastddp.watch.process import Kind
from fastddp.watch.snapshot import WaitSeen
from tests.unit.boards import STATE, WORLD, Rank, model, view, wait

A, B = id_of("a"), id_of("b")

IN_BACKWARD = Rank([wait(bucket=0, missing=[1])])
AT_BARRIER = Rank([wait(Source.SCRIPT, number=0, text="barrier")])


def stuck(*ranks: Rank, groups: Mapping[int, Sequence[int]] | None = None) -> list[int]:
    return sorted(deadlock(view(*ranks, groups=groups), 10_000_000_000))


def test_two_ranks_in_different_collectives_of_one_group() -> None:
    assert stuck(IN_BACKWARD, AT_BARRIER) == [0, 1]


def test_two_groups_crossed() -> None:
    first = Rank([wait(group=A, number=3, missing=[1])])
    second = Rank([wait(group=B, number=5, missing=[0])])
    assert stuck(first, second, groups={A: [0, 1], B: [0, 1]}) == [0, 1]


def test_a_circle_of_three() -> None:
    c = id_of("c")
    ranks = [Rank([wait(group=group, number=1, missing=[1])]) for group in (A, B, c)]
    assert stuck(*ranks, groups={A: [0, 1], B: [1, 2], c: [2, 0]}) == [0, 1, 2]


def test_those_who_wait_with_one_that_is_stuck_are_stuck_too() -> None:
    with_it = Rank([wait(bucket=0, missing=[1])])
    assert stuck(IN_BACKWARD, AT_BARRIER, with_it) == [0, 1, 2]


@pytest.mark.parametrize(
    "other",
    [
        Rank(),  # sleeps, computes: it may still come
        Rank([wait(Source.SCRIPT, number=0, text="barrier", waited_s=1.0)]),
        Rank(AT_BARRIER.waits, state=STATE[Kind.STOPPED]),
        Rank(AT_BARRIER.waits, state=STATE[Kind.GONE]),
        Rank(AT_BARRIER.waits, seen_s_ago=20.0),
        Rank(AT_BARRIER.waits, hand_overs=1),  # another thread of it may join
        Rank(AT_BARRIER.waits, has_script_threads=True),
        Rank(AT_BARRIER.waits, ending=Ending.EXITING),
        Rank([wait(Source.SCRIPT, number=0, text="barrier", thread=5)]),  # not the one that issues
        Rank([wait(bucket=0, missing=[0])]),  # the same collective
        Rank(has_board=False, is_here=False),
        Rank([wait(group=A, number=3, missing=[1])]),  # in a group of which nothing is known
    ],
)
def test_what_may_still_move_is_not_a_deadlock(other: Rank) -> None:
    assert stuck(IN_BACKWARD, other) == []


def test_a_rank_that_is_free_keeps_the_others_from_being_sure() -> None:
    # Rank 2 is stopped, and was in the middle of what rank 1 waits for: rank 0 had done its part.
    ahead = Rank([wait(Source.NAMED, number=0, text="the next")])
    behind = Rank([wait(Source.NAMED, number=0, text="the first")])
    assert stuck(ahead, behind, Rank()) == []


def test_ranks_that_have_come_but_are_slow_are_not_stuck() -> None:
    slow = Rank([wait(number=9, unfinished=[1])])
    assert stuck(slow, Rank([wait(number=10, missing=[0])])) == []


def test_buckets_of_one_round_are_launched_before_they_are_waited_for() -> None:
    ranks = [Rank([wait(Source.BACKWARD, number=0, bucket=bucket)]) for bucket in (0, 1)]
    assert stuck(*ranks) == []


@pytest.mark.parametrize(
    ("begun", "are_stuck"),
    [
        pytest.param(8, True, id="as many as the other one"),
        pytest.param(9, False, id="one more, which may be what the other one is in"),
    ],
)
@pytest.mark.parametrize(
    "waits",
    [
        wait(bucket=0, missing=[1]),  # in shared memory
        wait(Source.BACKWARD, number=0, bucket=0),
        wait(Source.SCRIPT, number=0, text="all_reduce"),
        wait(Source.NAMED, number=0, text="join"),
    ],
)
def test_what_was_begun_and_not_waited_for_is_not_missing(
    waits: WaitSeen, begun: int, are_stuck: bool
) -> None:
    # all_reduce(..., async_op=True) on rank 0, and the same call on rank 1, which waits in it.
    assert stuck(Rank([waits], begun=begun), AT_BARRIER) == ([0, 1] if are_stuck else [])


def test_the_buckets_of_a_round_are_not_counted_as_begun_before_it() -> None:
    launched = replace(model(steps=5, phase=1), launched=3)
    buckets = [wait(Source.BACKWARD, number=0, bucket=1)]
    assert stuck(Rank(buckets, [launched], begun=8 + 2), AT_BARRIER) == [0, 1]
    assert stuck(Rank(buckets, [launched], begun=8 + 3), AT_BARRIER) == []


def test_a_group_that_does_not_count_is_not_sure() -> None:
    seen = view(IN_BACKWARD, AT_BARRIER)
    for rank, member in list(seen.members.items()):
        assert member.board is not None
        unknown = replace(member, board=replace(member.board, sequences=()))
        changed = replace(seen, members={**seen.members, rank: unknown})
        assert deadlock(changed, 10_000_000_000) == {}


def test_bits_say_too_little_of_a_large_group() -> None:
    second = Rank([wait(group=A, missing=[0])])
    for num_ranks, found in ((64, [0, 1]), (65, [])):
        groups = {WORLD: range(num_ranks), A: [0, 1]}
        assert stuck(Rank([wait(missing=[1])]), second, groups=groups) == found


def test_a_wait_for_a_thread_of_its_own_counts_as_that_thread_s() -> None:
    own = wait(Source.OWN_THREAD, group=0, number=0, text="another thread")
    inner = wait(bucket=0, missing=[1], thread=77, place=1)
    assert stuck(Rank([own, inner]), AT_BARRIER) == [0, 1]
