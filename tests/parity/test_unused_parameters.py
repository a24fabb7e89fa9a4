"""Parameters that some ranks or all did not use, and parameters that are frozen."""

from __future__ import annotations

import pytest
import torch

from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder, bits, gradients, wrap_small
from tests.parity.scenarios import Scenarios, wrapped_ladder
from tests.ranks import run_ranks
from tests.slow import slow_but_for

SCENARIOS = Scenarios()


@SCENARIOS
def used_by_no_rank_stays_without_a_gradient(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size), used="ace").backward()
        m = mean_x(step, world_size)
        assert_ladder(ours.module, {"a": m, "b": None, "c": m, "d": None, "e": m}, step)


@SCENARIOS
def used_by_no_rank_keeps_the_very_bits_of_an_older_gradient(
    rank: int, world_size: int, engine: str
) -> None:
    """A mean of equal values may be another value, and NaN is none: they must not move."""
    ours = wrapped_ladder(engine)
    odd = torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45])
    for step in range(4):
        ours.zero_grad()
        ours.module.d.grad = odd.clone()
        ours.module.a.grad = torch.tensor([0.1, 0.2, 0.3]) * (rank + 1)  # even if ranks differ
        kept = gradients(ours.module)
        ours(ladder_x(rank, step, world_size), used="bce").backward()
        for name in "ad":
            assert bits(ours.module.get_parameter(name).grad) == bits(kept[name]), (name, step)
        m = mean_x(step, world_size)
        for name in "bce":
            grad = ours.module.get_parameter(name).grad
            assert grad.unique().tolist() == [m * Ladder.factor(name)], "others' are not poisoned"


@SCENARIOS
def used_by_no_rank_keeps_the_bits_of_the_round_before(
    rank: int, world_size: int, engine: str
) -> None:
    """The older gradient is the bucket's own memory here."""
    ours = wrapped_ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(0.1 * (rank + 1) + step / 7).backward()
        kept = gradients(ours.module)
        assert bits(kept["d"]) is not None
        for again in range(3):
            ours(ladder_x(rank, step + again, world_size), used="ab").backward()
            now = gradients(ours.module)
            for name in "cde":
                assert bits(now[name]) == bits(kept[name]), (name, step, again)
            assert bits(now["a"]) != bits(kept["a"])


@SCENARIOS
def used_by_some_ranks_is_averaged_on_all(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size), used="abcde" if rank == 1 else "ae").backward()
        m, only_1 = mean_x(step, world_size), mean_x(step, world_size, only=[1])
        want = {"a": m, "b": only_1, "c": only_1, "d": only_1, "e": m}
        assert_ladder(ours.module, want, step)


@SCENARIOS
def used_by_some_ranks_adds_to_an_older_gradient(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        ours(ladder_x(rank, step + 1, world_size), used="abc" if rank == 0 else "cd").backward()
        first, second = mean_x(step, world_size), mean_x(step + 1, world_size)
        only_0 = mean_x(step + 1, world_size, only=[0])
        want = {
            "a": first + only_0,
            "b": first + only_0,
            "c": first + second,
            "d": first + second - only_0,
            "e": first,
        }
        assert_ladder(ours.module, want, step)


@SCENARIOS
def the_unused_set_changes_by_rank_and_step(rank: int, world_size: int, engine: str) -> None:
    def used_by(r: int, step: int) -> str:
        """Bits of a number that visits all sets; never empty: `a` is in when nothing else is."""
        chosen = [name for bit, name in enumerate("bcde") if (5 * step + 7 * r) >> bit & 1]
        return "".join(chosen) or "a"

    ours = wrapped_ladder(engine)
    for step in range(16):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size), used=used_by(rank, step)).backward()
        want: dict[str, float | None] = {}
        for name in Ladder.NAMES:
            users = [r for r in range(world_size) if name in used_by(r, step)]
            want[name] = mean_x(step, world_size, only=users) if users else None
        assert_ladder(ours.module, want, step)


@SCENARIOS
def a_rank_whose_backward_reaches_no_parameter(rank: int, world_size: int, engine: str) -> None:
    """It has no gradient to start a round with, and still the others wait for its part."""
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        x = torch.tensor(ladder_x(rank, step, world_size), requires_grad=True)
        if rank == 0:
            ours(x, used="").backward()
        else:
            ours(x).backward()
        others = mean_x(step, world_size, only=range(1, world_size))
        assert_ladder(ours.module, others, step)


@SCENARIOS
def frozen_parameters_stay_without_a_gradient(rank: int, world_size: int, engine: str) -> None:
    model = Ladder()
    model.b.requires_grad_(False)
    model.e.requires_grad_(False)
    ours = wrap_small(model, engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        assert_ladder(model, {"a": m, "b": None, "c": m, "d": m, "e": None}, step)


@SCENARIOS
def freezing_and_unfreezing_after_wrapping(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(6):
        ours.zero_grad()
        thawed = step % 2 == 0
        ours.module.c.requires_grad_(thawed)
        ours.module.e.requires_grad_(thawed)
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        wanted = m if thawed else None
        assert_ladder(ours.module, {"a": m, "b": m, "c": wanted, "d": m, "e": wanted}, step)


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, world_size: int, engine: str) -> None:
    run_ranks(SCENARIOS[name], world_size, engine)
