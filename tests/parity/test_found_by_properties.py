"""What random programs (test_properties.py) once got wrong, each in its smallest form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import bits, wrap_small
from tests.parity.programs import NoGradient
from tests.ranks import run_ranks


class Scale(nn.Module):
    """The first edge of its graph leads to the input, not to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _inputs_on_one_rank(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.DistributedDataParallel(Scale(), engine=engine)
    x = torch.full((3,), float(rank), requires_grad=True)
    if rank == 0:
        ours(x).sum().backward(inputs=[x])
        assert x.grad.tolist() == [1.0] * 3
        assert ours.stats().rounds == 0
    ours(x).sum().backward()
    assert ours.module.weight.grad.tolist() == [(world_size - 1) / 2] * 3


def test_backward_to_the_input_on_one_rank_alone(engine: str) -> None:
    run_ranks(_inputs_on_one_rank, 2, engine, timeout=10.0)


def _undefined_gradient(rank: int, world_size: int, engine: str) -> None:
    """Autograd runs a parameter's hooks also when no gradient has come through."""
    ours = wrap_small(Ladder(), engine)
    for step in range(3):
        ours.zero_grad()
        ours.module.d.grad = torch.full((5,), 0.1 * (rank + 1))
        kept = bits(ours.module.d.grad)
        loss = ours(ladder_x(rank, step, world_size), used="ab")
        (loss + NoGradient.apply(ours.module.d).sum()).backward()
        assert bits(ours.module.d.grad) == kept, step
        assert ours.module.b.grad.unique().tolist() == [2 * mean_x(step, world_size)]


def test_an_undefined_gradient_is_no_use_of_the_parameter(engine: str) -> None:
    run_ranks(_undefined_gradient, 2, engine)


def _thrown_away(rank: int, world_size: int, engine: str) -> None:
    ours = wrap_small(Ladder(), engine)
    for step in range(3):
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size)).backward()
        ours.zero_grad()
        ours.module.d.grad = torch.full((5,), 0.1 * (rank + 1))
        kept = bits(ours.module.d.grad)
        ours(ladder_x(rank, step, world_size), used="ab").backward()
        assert bits(ours.module.d.grad) == kept, step


def test_what_no_sync_left_and_zero_grad_threw_away_is_no_use_of_the_parameter(
    engine: str,
) -> None:
    run_ranks(_thrown_away, 2, engine)


class Stop(Exception):
    pass


def _stop(_: Tensor) -> None:
    raise Stop


class Shared(nn.Module):
    """Two re-entrant checkpoints share its layer: two gradients in every backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, x: Tensor, stop: bool) -> Tensor:
        x = checkpoint(self.layer, x, use_reentrant=True)
        if stop:
            x.register_hook(_stop)
        return checkpoint(self.layer, x, use_reentrant=True)


def _stopped_at_first(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.DistributedDataParallel(Shared(), engine=engine)
    for step in range(3):
        ours.zero_grad()
        x = torch.full((1, 1), float(rank + 1), requires_grad=True)
        loss = ours(x, stop=rank == 1 and step == 0).sum()
        if rank == 1 and step == 0:
            with pytest.raises(Stop):
                loss.backward()
        else:
            loss.backward()
        if step:
            assert ours.module.layer.weight.grad.item() == world_size + 1


def test_shared_checkpoints_after_a_first_backward_that_raised(engine: str) -> None:
    run_ranks(_stopped_at_first, 2, engine)
