"""Scenarios: functions that a decorator collects, and that one test runs by their names.

A scenario is a function `(rank, world_size, engine)` that checks itself on every rank; the test at
the end of a file runs each on two and three ranks with either engine. Nearly all scenarios use the
`Ladder`, whose gradients are whole numbers that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import fastddp
from tests.models import Ladder
from tests.parity.checks import wrap_small

Scenario = Callable[[int, int, str], object]


class Scenarios(dict[str, Scenario]):
    """Maps the name of each decorated function to the function."""

    def __call__(self, function: Scenario) -> Scenario:
        self[function.__name__] = function
        return function


def wrapped_ladder(engine: str) -> fastddp.DistributedDataParallel:
    ours = wrap_small(Ladder(), engine)
    assert len(ours.plan().buckets) > 1
    return ours
