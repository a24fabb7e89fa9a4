"""Hooks of tensors and activation checkpointing in a wrapped model."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.models import CASES, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, gradients, wrap_small
from tests.parity.scenarios import Scenarios, wrapped_ladder
from tests.ranks import run_ranks
from tests.slow import slow_but_for

SCENARIOS = Scenarios()


@SCENARIOS
def tensor_hooks_see_and_change_the_local_gradient(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    seen = []

    def double(grad: Tensor) -> Tensor:
        seen.append(grad.unique().item())
        return 2 * grad

    ours.module.c.register_hook(double)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        assert_ladder(ours.module, dict.fromkeys("abde", m) | {"c": 2 * m}, step)
    assert seen == [3 * ladder_x(rank, step, world_size) for step in range(3)]


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner.children():
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@SCENARIOS
def activation_checkpointing_changes_nothing(rank: int, world_size: int, engine: str) -> None:
    case = CASES["mlp"]
    for reentrant in (False, True):
        plain = wrap_small(case.build(), engine)
        ours = wrap_small(Checkpointed(case.build(), reentrant), engine)
        for step in range(3):
            (x,) = case.inputs(rank, step)
            x.requires_grad_()  # the re-entrant kind needs it
            for model in (plain, ours):
                model.zero_grad()
                loss_of(model(x)).backward()
            got = gradients(ours.module.inner)
            want = gradients(plain.module)
            for name, grad in want.items():
                # A re-entrant backward ends several times, and an average may be averaged again;
                # that of W equal numbers may round, though not between two ranks.
                rtol = 0.0 if world_size == 2 or not reentrant else 1e-6
                torch.testing.assert_close(got[name], grad, rtol=rtol, atol=0.0)


class SkipsLayers(nn.Module):
    """All of it is checkpointed, so every gradient comes from a backward within the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        for index, layer in enumerate(self.layers):
            if not (skip and index == 1):
                x = torch.tanh(checkpoint(layer, x, use_reentrant=True))
        return x


@SCENARIOS
def reentrant_checkpoints_whose_number_differs_by_rank(
    rank: int, world_size: int, engine: str
) -> None:
    ours = wrap_small(SkipsLayers(), engine)
    plain = SkipsLayers()

    def loss(model: nn.Module, r: int, step: int) -> Tensor:
        x = torch.full((1, 3), float(r + 1), requires_grad=True)
        return loss_of(model(x, r == 0 and step == 1))

    for step in range(3):
        ours.zero_grad()
        loss(ours, rank, step).backward()
        plain.zero_grad()
        for r in range(world_size):
            (loss(plain, r, step) / world_size).backward()
        for name, p in plain.named_parameters():
            # The same three sums and scalings in another order: a few roundings.
            torch.testing.assert_close(
                ours.module.get_parameter(name).grad, p.grad, rtol=1e-5, atol=1e-7
            )


class PartlyCheckpointed(nn.Module):
    """The shared layer's gradient arrives twice in one backward: from within and from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CASES["used_twice"].build()

    def forward(self, x: Tensor) -> Tensor:
        first, shared, last = self.inner.children()
        x = checkpoint(lambda x: torch.tanh(shared(torch.tanh(first(x)))), x, use_reentrant=True)
        return last(torch.tanh(shared(x)))


@SCENARIOS
def two_gradients_of_a_parameter_in_one_backward(rank: int, world_size: int, engine: str) -> None:
    """They add up, also where each parameter has a bucket of its own that could go after one."""
    case = CASES["used_twice"]
    plain = fastddp.DistributedDataParallel(case.build(), engine=engine)
    for cap_mb in (None, 1e-6):
        ours = fastddp.DistributedDataParallel(
            PartlyCheckpointed(), engine=engine, bucket_cap_mb=cap_mb
        )
        for step in range(4):
            (x,) = case.inputs(rank, step)
            x.requires_grad_()
            for model in (ours, plain):
                model.zero_grad()
                loss_of(model(x)).backward()
            for name, want in gradients(plain.module).items():
                # Scaled before they are added instead of after: a rounding more per term.
                got = ours.module.inner.get_parameter(name).grad
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@SCENARIOS
def a_second_gradient_that_there_never_was_before(rank: int, world_size: int, engine: str) -> None:
    """If the first is still here they add up; once it is gone the error says what to do."""
    ours = fastddp.DistributedDataParallel(PartlyCheckpointed(), engine=engine, bucket_cap_mb=1e-6)
    (x,) = CASES["used_twice"].inputs(rank, 0)
    with mock.patch(f"{__name__}.checkpoint", lambda segment, x, **_: segment(x)):
        for _ in range(2):
            loss_of(ours(x)).backward()
    with pytest.raises(
        RuntimeError, match=r"inner\.shared\.\w+' got gradient number 2 .*use_reentrant=False"
    ):
        loss_of(ours(x.requires_grad_())).backward()


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, world_size: int, engine: str) -> None:
    run_ranks(SCENARIOS[name], world_size, engine)
