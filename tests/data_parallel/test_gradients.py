"""Gradients of `DataParallel` are those of the pieces, added in the order of the replicas."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

import fastddp
from tests.data_parallel.common import FOUR, THREE, TWO, Call, Scale, assert_bits_of_pieces, spread
from tests.models import CASES, loss_of


@pytest.mark.parametrize("devices", [TWO, THREE], ids=len)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_pieces_one_by_one(name: str, devices: list[str]) -> None:
    assert_bits_of_pieces(name, devices)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.has_batch_norm])
def test_training_is_that_of_the_plain_module_on_the_whole_batch(name: str) -> None:
    case = CASES[name]
    models = case.build(torch.float64 if name not in ("complex", "mixed_dtypes") else None), None
    plain, ours = models[0], fastddp.DataParallel(copy.deepcopy(models[0]), THREE)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, ours)]
    double = next(plain.parameters()).dtype == torch.float64
    for step in range(4):
        inputs = case.whole_batch(2, step, torch.float64 if double else None)
        losses = []
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(model(*inputs)))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(list(ours.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("slow", range(4))
def test_the_order_of_the_sum_is_the_replicas_and_not_the_threads(slow: int) -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        if x.item() == batch[slow].item():
            time.sleep(0.02)
        return module.scale(x)

    # In float32 only this order gives 1: 1e8 swallows what is added to it.
    batch = torch.tensor([[1e8], [3.0], [-1e8], [1.0]])
    model = spread(forward, FOUR, scale=Scale())
    for _ in range(3):
        model.zero_grad()
        model(batch).sum().backward()
        assert model.module.scale.weight.grad.item() == 1.0


def test_second_derivatives_go_through() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x = torch.arange(1.0, 5.0)
    weight = model.module.weight
    (first,) = torch.autograd.grad((model(x) ** 3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert second.item() == 6 * (x**3).sum().item()


def test_two_forwards_one_backward_and_gradients_of_inputs() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x = torch.arange(1.0, 6.0, requires_grad=True)
    (model(x).sum() + 2 * model(x).sum()).backward()
    assert model.module.weight.grad.item() == 3 * 15
    assert x.grad.tolist() == [3.0] * 5


def test_a_retained_graph_runs_twice_and_accumulates() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    loss = model(torch.arange(1.0, 5.0)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert model.module.weight.grad.item() == 2 * 60


def test_a_parameter_written_to_before_backward_is_noticed() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    loss = (model(torch.ones(4, requires_grad=True)) ** 2).sum()
    with torch.no_grad():
        model.module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_parameters_see_the_sum_once() -> None:
    model = fastddp.DataParallel(Scale(), THREE)
    seen: list[float] = []
    model.module.weight.register_hook(lambda grad: seen.append(grad.item()))
    after: list[float] = []
    model.module.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.item()))
    model(torch.arange(1.0, 7.0)).sum().backward()
    assert seen == after == [21.0]


@pytest.mark.parametrize("used_from", [0, 2], ids=["by both", "by the second"])
def test_sparse_gradients(used_from: int) -> None:
    plain = nn.Embedding(10, 3, sparse=True)
    model = spread(
        lambda module, x: module.net(x) if x[0] >= used_from else torch.zeros(len(x), 3),
        net=copy.deepcopy(plain),
    )
    rows = torch.tensor([1, 1, 2, 9])
    model(rows).sum().backward()
    plain(rows[used_from:]).sum().backward()
    assert model.module.net.weight.grad.is_sparse
    assert torch.equal(model.module.net.weight.grad.to_dense(), plain.weight.grad.to_dense())
