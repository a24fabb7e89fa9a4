"""What scripts put around a backward: autocast, loss scaling, hooks, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddp
from tests.models import CASES, loss_of
from tests.parity.checks import assert_same_bits, gradients, wrap_small
from tests.ranks import run_ranks

STEPS = 4
MLP = CASES["mlp"]
Script = Callable[[nn.Module, int], list[Any]]
"""Trains a wrapped model on a rank; returns what it saw that has to be the same with torch."""


def _train(model: nn.Module, rank: int, compute: Callable[[Tensor], Tensor] | None = None) -> None:
    """Take plain steps; `compute` is the loss of a batch, by default the usual one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        (x,) = MLP.inputs(rank, step)
        (compute(x) if compute else loss_of(model(x))).backward()
        optimizer.step()


def _autocast(model: nn.Module, rank: int) -> list[Any]:
    dtypes = []

    def compute(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Twice: autocast casts a weight once, and both passes share the copy.
            output = model(x) + model(-x)
        dtypes.append(output.dtype)
        return loss_of(output.float())

    _train(model, rank, compute)
    assert dtypes == [torch.bfloat16] * STEPS
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return dtypes


def _scaler(model: nn.Module, rank: int) -> list[Any]:
    """In one step one rank's loss is infinite: all ranks have to skip it and to halve the scale."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        (x,) = MLP.inputs(rank, step)
        loss = loss_of(model(x)) * (float("inf") if (rank, step) == (1, 1) else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped = all(map(torch.equal, before, model.parameters()))
        assert skipped == (step == 1), step
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**10]
    return [*scales, norms[0], norms[2:]]


def _tensor_hook(model: nn.Module, rank: int) -> list[Any]:
    """A parameter's hook gets this rank's own gradient, and what it returns is averaged."""
    seen: list[Any] = []

    def double(grad: Tensor) -> Tensor:
        seen.append(grad.tolist())
        return grad * 2

    handle = next(model.parameters()).register_hook(double)
    _train(model, rank)
    handle.remove()
    assert len(seen) == STEPS
    _train(model, rank)
    return seen


def _post_accumulate_hook(model: nn.Module, rank: int) -> list[Any]:
    """So does a hook after accumulation; what it leaves in `.grad` is averaged."""
    seen: list[Any] = []

    def change(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.tolist())
        param.grad.mul_(rank + 3)

    handle = next(model.parameters()).register_post_accumulate_grad_hook(change)
    _train(model, rank)
    handle.remove()
    assert len(seen) == STEPS
    return seen


def _module_hook(model: nn.Module, rank: int) -> list[Any]:
    seen: list[Any] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.append([grad.tolist() for grad in outputs])

    handles = [m.register_full_backward_hook(note) for m in model.modules()]
    _train(model, rank)
    for handle in handles:
        handle.remove()
    # torch's class is a module more, with the same gradient; wrap's result *is* the model.
    return [seen[0], len({str(grads) for grads in seen})]


SCRIPTS: dict[str, Script] = {
    "autocast": _autocast,
    "scaler": _scaler,
    "tensor hook": _tensor_hook,
    "post-accumulate hook": _post_accumulate_hook,
    "module hook": _module_hook,
}


def _as_with_torch(rank: int, world_size: int, engine: str, name: str) -> None:
    theirs = nn.parallel.DistributedDataParallel(MLP.build())
    expected = SCRIPTS[name](theirs, rank)
    for ours in (wrap_small(MLP.build(), engine), fastddp.wrap(MLP.build(), engine=engine)):
        assert SCRIPTS[name](ours, rank) == expected
        got, want = gradients(ours.module), gradients(theirs.module)
        assert_same_bits(got, want, f"{type(ours).__name__}: gradients")
        got, want = dict(ours.module.named_parameters()), dict(theirs.module.named_parameters())
        assert_same_bits(got, want, f"{type(ours).__name__}: parameters")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_bits_as_with_torch(engine: str, name: str) -> None:
    run_ranks(_as_with_torch, 2, engine, name)


def _penalised(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return loss_of(output) + slope.square().sum(1).mean()


def _gradient_penalty(rank: int, world_size: int, engine: str) -> None:
    """The inner derivative is each rank's own and synchronises nothing; the outer one does."""
    plain = MLP.build().double()
    ours = fastddp.wrap(MLP.build().double(), engine=engine)
    for step in range(STEPS):
        for model in (plain, ours):
            model.zero_grad()
        _penalised(plain, *MLP.whole_batch(world_size, step, torch.float64)).backward()
        _penalised(ours, *MLP.inputs(rank, step, torch.float64)).backward()
        assert ours.stats().rounds == step + 1
        for name, param in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, param.grad)


def test_a_gradient_penalty(engine: str) -> None:
    run_ranks(_gradient_penalty, 2, engine)
