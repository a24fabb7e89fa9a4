"""The groups that are watched: which rank this process has, and how their stores are used."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fastddp.watch import board, groups
from fastddp.watch.board import Board
from fastddp.watch.groups import watch_group
from fastddp.watch.names import DEFAULT_GROUP


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    own = Board()
    monkeypatch.setattr(board, "_board", own)
    monkeypatch.setattr(groups, "_groups", {})
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
