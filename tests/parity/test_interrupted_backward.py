"""A backward that raises, or never comes, leaves the next one right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.models import ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.parity.scenarios import Scenarios, wrapped_ladder
from tests.ranks import run_ranks
from tests.slow import slow_but_for

SCENARIOS = Scenarios()


class Stop(Exception):
    pass


def _raise_at(name_to_stop: str) -> Callable[[str, Tensor], object]:
    def raise_stop(_: Tensor) -> None:
        raise Stop

    def on_term(name: str, term: Tensor) -> None:
        if name == name_to_stop:
            term.register_hook(raise_stop)

    return on_term


@SCENARIOS
def an_exception_in_backward_on_all_ranks(rank: int, world_size: int, engine: str) -> None:
    """Before the first gradient, between two, and after some buckets are on their way."""
    ours = wrapped_ladder(engine)
    for step, name in enumerate("eacdbea"):
        ours.zero_grad()
        with pytest.raises(Stop):
            ours(ladder_x(rank, 9, world_size), on_term=_raise_at(name)).backward()
        for again in range(2):
            ours.zero_grad()
            ours(ladder_x(rank, step + again, world_size)).backward()
            assert_ladder(ours.module, mean_x(step + again, world_size), (name, again))


@SCENARIOS
def an_exception_in_backward_on_one_rank(rank: int, world_size: int, engine: str) -> None:
    """The others' backward ends, and the next step is right on all."""
    ours = wrapped_ladder(engine)
    for step, name in enumerate("dbca"):
        ours.zero_grad()
        if rank == 1:
            with pytest.raises(Stop):
                ours(ladder_x(rank, 9, world_size), on_term=_raise_at(name)).backward()
        else:
            ours(ladder_x(rank, 9, world_size)).backward()
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), name)


@SCENARIOS
def an_exception_under_no_sync(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step, name in enumerate("ca"):
        with pytest.raises(Stop), ours.no_sync():
            ours(ladder_x(rank, 9, world_size), on_term=_raise_at(name)).backward()
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), name)


@SCENARIOS
def a_forward_without_a_backward(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        with torch.no_grad():
            ours(1.0)
        ours(2.0)
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, world_size: int, engine: str) -> None:
    run_ranks(SCENARIOS[name], world_size, engine)
