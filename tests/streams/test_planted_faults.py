"""Faults put into an engine, or into the group, are found: the tests of the engines can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastddp.engine.python import memory
from fastddp.engine.python.reducer import PythonReducer
from fastddp.engine.python.round import Round
from tests.ranks import run_ranks
from tests.streams import device, programs
from tests.streams.group import RecordedWork, RecordingGroup

# A fault is planted for good: each test has a process of its own.


def no_wait_at_the_end() -> None:
    Round._wait_for = lambda *_: None


def write_after_launch() -> None:
    launch = Round._launch_next

    def launch_too_early(self: Any, *, waits: bool) -> None:
        number = self._next
        launch(self, waits=waits)
        self.buckets[number].flags.fill_(1)

    Round._launch_next = launch_too_early


def buckets_of_an_abandoned_round() -> None:
    abandon = PythonReducer._abandon_round

    def abandon_and_reuse(self: Any, current: Any) -> None:
        abandon(self, current)
        self._installation.buckets = current.buckets
        self._marks._left = None  # or the next forward would wait for the round

    PythonReducer._abandon_round = abandon_and_reuse


def memory_that_is_not_zeroed() -> None:
    def allocate(numel: int, dtype: torch.dtype, _: Any) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=device.NAME)

    memory.allocate = allocate


def host_reads_a_bucket() -> None:
    hand_out = Round.hand_out

    def look_and_hand_out(self: Any) -> None:
        self.buckets[0]._flat.isfinite().all().item()
        hand_out(self)

    Round.hand_out = look_and_hand_out


def group_that_forgets_to_wait() -> None:
    RecordedWork.wait = lambda *_: True


def group_that_waits_for_no_stream() -> None:
    """Its collectives run as soon as they are called."""
    start = RecordingGroup._start

    def start_at_once(self: Any, *args: Any, **options: Any) -> Any:
        self.stream = device.stream("the group's stream")
        with self.stream:
            return start(self, *args, **options)

    RecordingGroup._start = start_at_once


FAULTS = (
    (no_wait_at_the_end, programs.several_rounds, "python", "race"),
    (write_after_launch, programs.several_rounds, "python", "race"),
    (buckets_of_an_abandoned_round, programs.backward_raises, "python", "race"),
    (memory_that_is_not_zeroed, programs.several_rounds, "python", "uninitialised read"),
    (group_that_forgets_to_wait, programs.several_rounds, "python", "race"),
    (group_that_forgets_to_wait, programs.several_rounds, "native", "race"),
    (group_that_waits_for_no_stream, programs.several_rounds, "python", "race"),
    (group_that_waits_for_no_stream, programs.several_rounds, "native", "race"),
)


def _run(
    rank: int, world_size: int, fault: Callable[[], None], program: programs.Program, engine: str
) -> programs.Outcome:
    device.load()
    fault()
    return programs.run(program, engine)


@pytest.mark.parametrize(
    ("fault", "program", "engine", "kind"),
    FAULTS,
    indirect=["engine"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_is_found(
    fault: Callable[[], None], program: programs.Program, engine: str, kind: str
) -> None:
    [outcome] = run_ranks(_run, 1, fault, program, engine, init_group=False)
    assert outcome.error == ""
    assert any(finding.startswith(kind) for finding in outcome.findings), outcome.findings


def test_a_planted_wait_of_the_host_is_found() -> None:
    args = (host_reads_a_bucket, programs.several_rounds, "python")
    [outcome] = run_ranks(_run, 1, *args, init_group=False)
    assert outcome.error == ""
    assert outcome.findings == []
    for waits in outcome.waits[programs.SETTLED :]:
        [wait] = waits
        assert "test_planted_faults.py" in wait
