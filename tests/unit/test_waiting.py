"""Waits by name: when they come to the board, who leaves a note, and what is kept of them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from fastddp.comm.waiting import waiting
from fastddp.watch import board, correspondence, groups, named, own_waits, watcher
from fastddp.watch.clerk import Clerk
from fastddp.watch.layout import Source
from fastddp.watch.slow_wait import SlowWait, What
from fastddp.watch.watcher import Watcher


class Group:
    """As much of rank 0's group as a wait looks at."""

    def __init__(self, name: str) -> None:
        self.group_name = name
        self.store = dist.HashStore()  # type: ignore[attr-defined]

    def rank(self) -> int:
        return 0

    def note(self) -> str:
        key = "fastddp waits/0"
        return self.store.get(key).decode() if self.store.check([key]) else "none"


class PromptClerk(Clerk):
    """Does at once what it is asked to."""

    def ask(self, _name: str, errand: Callable[[], object]) -> None:
        errand()


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Has a watcher look that is not a thread, at waits that have lasted for long enough."""
    monkeypatch.setattr(own_waits, "_NAMED_AFTER_S", 0.0)
    monkeypatch.setattr(correspondence, "_NOTE_AFTER_S", 0.0)
    monkeypatch.setattr(watcher, "_ASK_AFTER_S", 0.0)
    monkeypatch.setattr(groups, "_groups", {})
    monkeypatch.setattr(board, "_board", board.Board())
    own = board.own()
    assert own is not None
    yield Watcher(own, PromptClerk()).look
    assert named.waits == {}
    assert own.read().waits == ()


@pytest.fixture
def group(look: object) -> Group:
    return watched("a group")


def watched(name: str) -> Group:
    group = Group(name)
    assert groups.watch_group(name, [0, 1], 0, group.store)
    return group


def wait(group: Any, call: str, body: Callable[[], object]) -> waiting:
    block = waiting(group, call)
    with block:
        body()
    return block


def looked_at_and_failing(look: Callable[[], None]) -> Callable[[], None]:
    def fail() -> None:
        look()
        raise RuntimeError("too late")

    return fail


def test_a_wait_that_lasts_is_on_the_board(group: Group, look: Callable[[], None]) -> None:
    own = board.own()
    assert own is not None
    seen = []

    def body() -> None:
        assert own.read().waits == ()
        look()
        seen.extend(own.read().waits)

    wait(group, "a call", body)
    (on_board,) = seen
    assert (on_board.source, on_board.text) == (Source.NAMED, "a call")


def test_a_note_is_taken_back_when_its_wait_is_over(group: Group, look: Callable[[], None]) -> None:
    wait(group, "short", lambda: None)
    look()
    assert group.note() == "none"
    wait(group, "long", look)
    assert group.note() == "long on group 'a group'"
    look()
    assert group.note() == ""


def test_no_note_is_left_where_all_boards_can_be_read(
    group: Group, look: Callable[[], None]
) -> None:
    own = board.own()
    assert own is not None
    group.store.set("fastddp board/1", str(groups.own_address(own.fd)))
    look()
    wait(group, "a call", look)
    assert group.note() == "none"


def test_a_note_of_a_failed_wait_stays_until_the_group_s_next_wait(
    group: Group, look: Callable[[], None]
) -> None:
    another = watched("another")
    with pytest.raises(dist.DistBackendError, match=r"first failed.*: too late"):
        wait(group, "the first", looked_at_and_failing(look))
    for _ in range(2):
        wait(another, "elsewhere", lambda: None)
        look()
        assert group.note() == "the first on group 'a group'"
    wait(group, "the next", lambda: None)  # so short that it has no note of its own
    look()
    assert group.note() == ""


def test_an_error_says_what_the_others_have_noted(group: Group, look: Callable[[], None]) -> None:
    with pytest.raises(dist.DistBackendError, match=r"\(rank 1 not there yet; do all ranks"):
        wait(group, "the first", looked_at_and_failing(look))
    group.store.set("fastddp waits/1", "the second")
    with pytest.raises(dist.DistBackendError, match=r"failed \(rank 1 waits in the second\): too"):
        wait(group, "the first", looked_at_and_failing(look))


def test_a_wait_of_python_can_be_ordered_to_fail(group: Group, look: Callable[[], None]) -> None:
    own = board.own()
    assert own is not None

    def body() -> None:
        look()
        slow = SlowWait(What("a collective"), time.monotonic_ns())
        slow.look()  # there is no order yet
        (mine,) = own.read().waits
        assert own.order_to_fail(mine, "all of them wait for ever")
        slow.look()

    with pytest.raises(dist.DistBackendError, match=r"a call failed.*: all of them wait for ever"):
        wait(group, "a call", body)


def test_a_wait_that_is_over_cannot_be_ordered_to_fail(
    group: Group, look: Callable[[], None]
) -> None:
    own = board.own()
    assert own is not None
    seen = []

    def body() -> None:
        look()
        seen.extend(own.read().waits)

    wait(group, "a call", body)
    assert not own.order_to_fail(seen[0], "too late")
    time.sleep(0.001)

    def another() -> None:
        look()
        assert not own.order_to_fail(seen[0], "too late")
        SlowWait(What("a collective"), time.monotonic_ns()).look()

    wait(group, "another", another)


def test_nothing_is_kept_of_a_failed_wait(group: Group, look: Callable[[], None]) -> None:
    block = waiting(group, "the call")  # type: ignore[arg-type]
    with pytest.raises(dist.DistBackendError), block:
        looked_at_and_failing(look)()
    alive = weakref.ref(block)
    del block
    gc.collect()
    assert alive() is None
    assert group.note() == "the call on group 'a group'"


def test_a_store_is_not_kept(group: Group, look: Callable[[], None]) -> None:
    alive = weakref.ref(group.store)
    wait(group, "a call", look)
    del group.store
    gc.collect()
    assert alive() is None
    look()
    assert groups.watched() == []


def test_a_setting_that_is_not_valid_is_an_error(
    look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    for name in ("FASTDDP_STALL", "FASTDDP_STALL_SECONDS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "rase")
            with pytest.raises(ValueError, match=name):
                watcher.watch_group("a group", [0, 1], 0, store)


def test_a_system_that_has_no_threads_left_is_not_an_error(
    look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(watcher, "_thread", watcher._Thread())
    monkeypatch.setattr(threading.Thread, "start", fail)
    store = dist.HashStore()  # type: ignore[attr-defined]
    watcher.watch_group("a group", [0, 1], 0, store)
    watcher._thread.stop()


def test_an_errand_that_fails_does_not_keep_others_from_being_run() -> None:
    clerk, done = Clerk(), threading.Event()
    clerk.start()
    clerk.ask("fails", lambda: {}["a key"])
    clerk.ask("another", done.set)
    assert done.wait(60)
    clerk.stop()
