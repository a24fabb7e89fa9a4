"""Gradients accumulated under `no_sync` are averaged once, by the next backward outside of it."""

from __future__ import annotations

import pytest
import torch

from tests.models import ladder_x, mean_x
from tests.parity.checks import assert_ladder, bits
from tests.parity.scenarios import Scenarios, wrapped_ladder
from tests.ranks import run_ranks
from tests.slow import slow_but_for

SCENARIOS = Scenarios()


@SCENARIOS
def no_sync_accumulates_and_the_next_synced_backward_averages(
    rank: int, world_size: int, engine: str
) -> None:
    ours = wrapped_ladder(engine)
    for step in (0, 10, 20):
        ours.zero_grad()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size)).backward()
            assert_ladder(ours.module, ladder_x(rank, step, world_size), "only local")
            ours(ladder_x(rank, step + 1, world_size)).backward()
        local = ladder_x(rank, step, world_size) + ladder_x(rank, step + 1, world_size)
        assert_ladder(ours.module, local, "still local")
        ours(ladder_x(rank, step + 2, world_size)).backward()
        mean = sum(mean_x(step + k, world_size) for k in range(3))
        assert_ladder(ours.module, mean, step)


@SCENARIOS
def backward_decides_not_forward(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    x = ladder_x(rank, 1, world_size)

    loss = ours(x)
    with ours.no_sync():
        loss.backward()
    assert_ladder(ours.module, x, "forward outside, backward inside: local")

    ours.zero_grad()
    with ours.no_sync():
        loss = ours(x)
    loss.backward()
    assert_ladder(ours.module, mean_x(1, world_size), "forward inside, backward outside: averaged")


@SCENARIOS
def the_attribute_is_the_context(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    x = ladder_x(rank, 1, world_size)
    assert ours.require_backward_grad_sync is True
    ours.require_backward_grad_sync = False
    ours(x).backward()
    assert_ladder(ours.module, x, "local")
    with ours.no_sync():
        assert ours.require_backward_grad_sync is False
    assert ours.require_backward_grad_sync is False, "the context restores what it found"
    ours.require_backward_grad_sync = True
    ours(x).backward()
    assert_ladder(ours.module, 2 * mean_x(1, world_size), "averaged")
    with pytest.raises(KeyError), ours.no_sync():
        raise KeyError
    assert ours.require_backward_grad_sync is True


@SCENARIOS
def what_only_no_sync_used_is_averaged_too(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in (0, 1, 2):
        ours.zero_grad()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size), used="ad").backward()
        ours(ladder_x(rank, step + 5, world_size), used="abc").backward()
        early, late = mean_x(step, world_size), mean_x(step + 5, world_size)
        want = {"a": early + late, "b": late, "c": late, "d": early, "e": None}
        assert_ladder(ours.module, want, step)


@SCENARIOS
def what_only_no_sync_of_one_rank_used_is_averaged_too(
    rank: int, world_size: int, engine: str
) -> None:
    ours = wrapped_ladder(engine)
    for step in (0, 1, 2):
        ours.zero_grad()
        with ours.no_sync():
            used = "cd" if rank == 1 else "c"
            ours(ladder_x(rank, step, world_size), used=used).backward()
        ours(ladder_x(rank, step + 5, world_size), used="abc").backward()
        early, late = mean_x(step, world_size), mean_x(step + 5, world_size)
        only_1 = mean_x(step, world_size, only=[1])
        want = {"a": late, "b": late, "c": early + late, "d": only_1, "e": None}
        assert_ladder(ours.module, want, step)


@SCENARIOS
def what_was_accumulated_is_averaged_once(rank: int, world_size: int, engine: str) -> None:
    """In the round after the one that averaged it, an unused parameter is unused again."""
    ours = wrapped_ladder(engine)
    for step in range(2):
        ours.zero_grad()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size), used="d").backward()
        ours(ladder_x(rank, step, world_size), used="a").backward()
        ours.module.d.grad = torch.full((5,), 0.1 * (rank + 1))
        ours(ladder_x(rank, step, world_size), used="a").backward()
        assert bits(ours.module.d.grad) == bits(torch.full((5,), 0.1 * (rank + 1)))
        assert ours.module.a.grad.unique().tolist() == [2 * mean_x(step, world_size)]


@SCENARIOS
def zero_grad_between_no_sync_and_the_synced_backward(
    rank: int, world_size: int, engine: str
) -> None:
    """What was accumulated was thrown away, so it must not be averaged either."""
    ours = wrapped_ladder(engine)
    for step, set_to_none in ((0, True), (1, False), (2, True), (3, False)):
        ours(ladder_x(rank, 9, world_size)).backward()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size)).backward()
        ours.zero_grad(set_to_none=set_to_none)
        ours(ladder_x(rank, step, world_size), used="abc").backward()
        mean = mean_x(step, world_size)
        unused = None if set_to_none else 0.0
        assert_ladder(ours.module, dict.fromkeys("abc", mean) | dict.fromkeys("de", unused), step)
        ours.zero_grad()


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, world_size: int, engine: str) -> None:
    run_ranks(SCENARIOS[name], world_size, engine)
