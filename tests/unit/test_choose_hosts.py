"""Which ranks share memory is decided from their announcements alone, alike on every rank."""

from __future__ import annotations

import pytest

from fastddp.comm.hosts import Announcement, Choice, Hosts, choose_hosts

HEAP = (1, 3, 1 << 20, 5, 6)


def ranks_on(hosts: str, *, why_not: str | None = None) -> list[Announcement]:
    """Return what ranks say that are on hosts of one letter each."""
    return [Announcement(host, HEAP, "1", why_not) for host in hosts]


def choices(said: list[Announcement]) -> list[Choice]:
    """Return what each rank chooses."""
    return [choose_hosts(said, rank) for rank in range(len(said))]


@pytest.mark.parametrize(
    ("hosts", "ranks"),
    [
        ("a", [[0]]),
        ("aa", [[0, 1]]),
        ("aab", [[0, 1], [2]]),
        ("abab", [[0, 2], [1, 3]]),
        ("bbaab", [[0, 1, 4], [2, 3]]),
    ],
)
def test_ranks_of_a_host_share_memory(hosts: str, ranks: list[list[int]]) -> None:
    for rank, choice in enumerate(choices(ranks_on(hosts))):
        (mine,) = (local for local in ranks if rank in local)
        assert choice == Choice(Hosts(ranks, mine), None)


@pytest.mark.parametrize("hosts", ["ab", "abc"])
def test_without_neighbours_there_is_nothing_to_share(hosts: str) -> None:
    assert choices(ranks_on(hosts)) == [Choice(None, None)] * len(hosts)


def test_what_all_ranks_were_told_alike_is_no_problem() -> None:
    assert choices(ranks_on("aa", why_not="FASTDDP_SHM=0")) == [Choice(None, None)] * 2


def test_one_rank_that_cannot_is_a_problem_of_that_rank() -> None:
    said = ranks_on("aaa")
    said[1] = said[1]._replace(why_not="it needs Linux", heap=None)
    assert [choice.problem for choice in choices(said)] == [None, "it needs Linux", None]
    assert all(choice.hosts is not None for choice in choices(said))


def test_two_reasons_are_problems_of_both_ranks() -> None:
    said = [*ranks_on("a", why_not="it needs Linux"), *ranks_on("a", why_not="FASTDDP_SHM=0")]
    assert [choice.problem for choice in choices(said)] == ["it needs Linux", "FASTDDP_SHM=0"]


def test_ranks_of_two_versions_say_so_unless_they_have_more_to_say() -> None:
    said = ranks_on("aaa")
    said[1] = said[1]._replace(version="2")
    said[2] = said[2]._replace(why_not="it needs Linux")
    assert [choice.problem for choice in choices(said)] == [
        "it has fastddp 1, another rank has not",
        "it has fastddp 2, another rank has not",
        "it needs Linux",
    ]


def test_a_lane_joins_the_ranks_of_one_place() -> None:
    hosts = Hosts([[0, 2, 4], [1, 3]], [0, 2, 4])
    assert hosts.num_lanes == 2
    assert [hosts.lane(place) for place in range(3)] == [[0, 1], [2, 3], []]
