"""The groups that are watched: which rank this process has, and how their stores are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fastddp.watch import board, groups, names
from fastddp.watch.board import Board
from fastddp.watch.clerk import Clerk
from fastddp.watch.correspondence import Correspondence
from fastddp.watch.groups import Watched, watch_group
from fastddp.watch.layout import Source
from fastddp.watch.names import DEFAULT_GROUP
from fastddp.watch.timing import Timing


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    own = Board()
    monkeypatch.setattr(board, "_board", own)
    monkeypatch.setattr(groups, "_groups", {})
    monkeypatch.setattr(names, "_groups", {})
    return own


def new_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


def test_the_rank_is_that_in_the_default_group(own: Board) -> None:
    stores = [new_store() for _ in range(4)]
    assert watch_group("a", [5, 7], 1, stores[0])
    assert own.read().rank == 7
    assert watch_group(DEFAULT_GROUP, range(9), 6, stores[1])
    assert own.read().rank == 6
    assert watch_group("b", [0, 1], 1, stores[2])
    assert own.read().rank == 6
    stores.clear()  # as destroy_process_group does
    store = new_store()
    assert watch_group("c", [2, 3], 0, store)
    assert own.read().rank == 2


def test_the_timeout_of_the_script_s_store_stays() -> None:
    inner = new_store()
    store = dist.PrefixStore("a group", inner)
    before = inner.timeout
    watched = Watched("a", [0, 1], 0, store)
    client = watched.client()
    assert client is store
    assert inner.timeout == before
    watched.write_note()


def test_a_store_over_tcp_is_used_by_a_connection_of_our_own() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=77))
    store = dist.PrefixStore("outer", dist.PrefixStore("inner", server))
    watched = Watched("a", [0, 1], 0, store)
    client = watched.client()
    assert client is not store
    assert client is watched.client()
    client.set("a key", "a value")
    assert store.get("a key") == b"a value"
    assert server.timeout == timedelta(seconds=77)


def test_a_board_that_cannot_be_opened_is_a_stranger_s(
    own: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_peers", {})
    store = new_store()
    watched = Watched("a", [0, 1], 0, store)
    mine = groups.own_address(own.fd)
    watched.addresses = {0: mine, 1: mine}
    assert not watched.has_strangers
    hidden = replace(mine, fd=10**6)
    watched.addresses[1] = hidden
    groups.peer(hidden).read()
    assert watched.has_strangers
    assert not watched.spans_hosts


@pytest.mark.parametrize(("waits", "num_times"), [(False, range(5, 15)), (True, range(100, 101))])
def test_addresses_that_never_come_are_looked_for_ever_more_rarely(
    waits: bool, num_times: range, own: Board
) -> None:
    names_of_errands: list[str] = []

    class CountingClerk(Clerk):
        def ask(self, name: str, _: Callable[[], object]) -> None:
            names_of_errands.append(name)

    store = new_store()
    assert watch_group("a", [0, 1], 0, store)
    if waits:
        own.begin_wait(Source.NAMED, "a call", since_ns=1)
    letters = Correspondence(CountingClerk(), Timing(10.0), str)
    for second in range(100):
        letters.exchange(groups.watched(), own.read(), second * 1_000_000_000)
    assert names_of_errands.count("addresses a") in num_times
