"""Both engines on the stand-in device: every use of memory is ordered, and no wait of the host."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.streams import device
from tests.streams.programs import (
    PROGRAMS,
    QUIET,
    ROUNDS,
    SETTLED,
    Outcome,
    Program,
    run,
)


def _run_all(rank: int, world_size: int, engine: str) -> dict[str, Outcome]:
    device.load()
    return {program.__name__: run(program, engine) for program in PROGRAMS}


_outcomes: dict[str, dict[str, Outcome]] = {}
"""By engine; one process runs all programs."""


@pytest.fixture
def outcomes(engine: str) -> dict[str, Outcome]:
    if engine not in _outcomes:
        [_outcomes[engine]] = run_ranks(_run_all, 1, engine, init_group=False)
    return _outcomes[engine]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_use_is_ordered(program: Program, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[program.__name__]
    assert outcome.error == ""
    assert outcome.findings == []


@pytest.mark.parametrize("program", QUIET, ids=lambda program: program.__name__)
def test_backward_does_not_wait(program: Program, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[program.__name__]
    assert outcome.error == ""
    assert len(outcome.waits) == ROUNDS
    assert outcome.waits[0] != []  # they are counted
    assert outcome.waits[SETTLED:] == [[]] * (ROUNDS - SETTLED)
