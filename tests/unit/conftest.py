"""Processes that are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.forks import Forks, forks


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("scripts")) as started:
        yield started


@pytest.fixture
def children(parent: Forks) -> Iterator[Forks]:
    yield parent
    parent.end_all()
