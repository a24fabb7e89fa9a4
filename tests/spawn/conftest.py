"""What is left after each call of `fastddp.spawn`, and a faster way to start ranks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

import pytest

from fastddp.comm.spawn import start
from tests.ranks import LAUNCHER_VARIABLES, PRELOAD
from tests.spawn.common import children, open_sockets


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No child, no port, no variable of a launcher is left in this process."""
    for name in (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    sockets = open_sockets()
    yield
    assert not [name for name in LAUNCHER_VARIABLES if name in os.environ]
    assert "OMP_NUM_THREADS" not in os.environ
    assert children() == set()
    assert open_sockets() == sockets


@pytest.fixture
def fast_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks the ranks from a server that has imported torch: seconds less a test."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    monkeypatch.setattr(start, "_START_METHOD", "forkserver")
