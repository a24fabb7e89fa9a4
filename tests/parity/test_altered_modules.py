"""Modules whose parameters are computed, normalised or replaced: torch's bits here too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.nn.utils import parametrizations, parametrize

import fastddp
from tests.parity.checks import assert_same_bits, gradients, wrap_small
from tests.ranks import run_ranks


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).t()


def _plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def weight_norm() -> nn.Module:
    model = _plain()
    parametrizations.weight_norm(model[0])
    return model


def spectral_norm() -> nn.Module:
    """Has buffers that a forward in training mode changes."""
    model = _plain()
    parametrizations.spectral_norm(model[2])
    return model


def symmetric() -> nn.Module:
    model = _plain()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


def tied_by_parametrization() -> nn.Module:
    model = _plain()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    model[2].weight = model[0].parametrizations.weight.original
    return model


def batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def _inputs(rank: int, step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def _beside_torch(
    rank: int, world_size: int, engine: str, build: Callable[[], nn.Module], forwards: int
) -> None:
    ours, theirs = wrap_small(build(), engine), TorchDDP(build())
    for step in range(4):
        for model in (ours, theirs):
            model.zero_grad()
            total = sum(model(_inputs(rank, 10 * step + n)).square().sum() for n in range(forwards))
            total.backward()
        assert_same_bits(gradients(ours.module), gradients(theirs.module), f"step {step}")
        assert_same_bits(dict(ours.named_buffers()), dict(theirs.named_buffers()), f"step {step}")
        for param in (*ours.parameters(), *theirs.parameters()):
            param.data -= 0.01 * param.grad


@pytest.mark.parametrize(
    "build", [weight_norm, spectral_norm, symmetric, tied_by_parametrization, batch_norm]
)
@pytest.mark.parametrize("forwards", [1, 2])
def test_gradients_are_torchs(engine: str, build: Callable[[], nn.Module], forwards: int) -> None:
    if build is spectral_norm and forwards == 2:
        pytest.skip("a second forward changes what the first one saved, with torch's class too")
    run_ranks(_beside_torch, 2, engine, build, forwards)


def _replaced(rank: int, world_size: int, engine: str) -> None:
    """Gradients of what takes the parameters' places belong to whoever made it."""
    model, x = fastddp.wrap(_plain(), engine=engine), _inputs(rank, 0)
    others = {name: param.detach().clone() for name, param in model.named_parameters()}
    for other in others.values():
        other.requires_grad_(True)
    functional_call(model, others, (x,)).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    alone = _plain()
    alone(x).sum().backward()
    assert_same_bits(
        {name: other.grad for name, other in others.items()}, gradients(alone), "this rank's own"
    )
    # Functions of the parameters lead back to them.
    doubled = {name: 2 * param for name, param in model.named_parameters()}
    functional_call(model, doubled, (x,)).sum().backward()
    want = []
    for other_rank in range(world_size):
        alone = _plain()
        functional_call(
            alone, {n: 2 * p for n, p in alone.named_parameters()}, (_inputs(other_rank, 0),)
        ).sum().backward()
        want.append(gradients(alone))
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, sum(grads[name] for grads in want) / world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_replaced_by_functional_call(world_size: int, engine: str) -> None:
    run_ranks(_replaced, world_size, engine)
