"""Notes of waits: who leaves one, how long it stays, and what is kept for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from fastddp.comm import waiting


class Group:
    """As much of rank 0's group as a wait looks at."""

    group_name = "a group"

    def __init__(self) -> None:
        self.store = dist.HashStore()  # type: ignore[attr-defined]

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def get_group_store(self) -> Any:
        return self.store

    def note(self) -> str:
        key = waiting._key(0)
        return self.store.get(key).decode() if self.store.check([key]) else "none"


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> waiting._Watcher:
    """A watcher that looks when it is told to, at waits that have lasted for long enough."""
    watcher = waiting._Watcher()
    watcher._thread = object()  # type: ignore[assignment]
    monkeypatch.setattr(waiting, "_watcher", watcher)
    monkeypatch.setattr(waiting, "_NOTE_AFTER_S", 0.0)
    monkeypatch.setattr(waiting, "_ASK_AFTER_S", 1e9)
    return watcher


def wait(group: Any, call: str, body: Callable[[], object]) -> waiting.waiting:
    block = waiting.waiting(group, call)
    with block:
        body()
    return block


def noted_and_failing(watcher: waiting._Watcher) -> Callable[[], None]:
    def fail() -> None:
        watcher._look()
        raise RuntimeError("too late")

    return fail


def test_a_note_is_taken_back_when_its_wait_is_over(watcher: waiting._Watcher) -> None:
    group = Group()
    wait(group, "short", lambda: None)
    watcher._look()
    assert group.note() == "none"
    wait(group, "long", watcher._look)
    assert group.note() == "long"
    watcher._look()
    assert group.note() == ""


def test_a_note_of_a_failed_wait_stays_until_the_group_s_next_wait(
    watcher: waiting._Watcher,
) -> None:
    group, another = Group(), Group()
    another.group_name = "another"
    with pytest.raises(dist.DistBackendError, match="first failed: too late"):
        wait(group, "the first", noted_and_failing(watcher))
    for _ in range(2):
        wait(another, "elsewhere", lambda: None)
        watcher._look()
        assert group.note() == "the first"
    wait(group, "the next", lambda: None)  # so short that it has no note of its own
    watcher._look()
    assert group.note() == ""


def test_a_wait_that_fails_while_it_is_looked_at_keeps_its_note(
    watcher: waiting._Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group()
    block = waiting.waiting(group, "the call")  # type: ignore[arg-type]
    block.__enter__()

    def look(self: waiting.waiting) -> None:
        with pytest.raises(dist.DistBackendError):
            self.__exit__(RuntimeError, RuntimeError("too late"), None)
        self.has_note = True
        self.write_note(self.call)

    monkeypatch.setattr(waiting.waiting, "look", look)
    for _ in range(3):
        watcher._look()
        assert group.note() == "the call"


def test_nothing_is_kept_of_a_failed_wait(watcher: waiting._Watcher) -> None:
    group = Group()
    block = waiting.waiting(group, "the call")  # type: ignore[arg-type]
    with pytest.raises(dist.DistBackendError), block:
        noted_and_failing(watcher)()
    alive = weakref.ref(block)
    del block
    gc.collect()
    assert alive() is None
    assert group.note() == "the call"
