"""What begins a round, the synchronised backward of all ranks, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastddp
from fastddp.device.nested import tensors_in
from tests.ranks import run_ranks


@dataclass
class Output:
    """What a model of today returns."""

    logits: Tensor
    cache: tuple[Tensor, ...]


class Net(nn.Module):
    """Returns its result in a way that is told."""

    def __init__(self, wrap_output: Callable[[Tensor], object] = lambda y: y) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.wrap_output = wrap_output

    def forward(self, x: Tensor) -> object:
        return self.wrap_output(self.layer(x))


def _one_rank_alone(rank: int, world_size: int, engine: str) -> None:
    """Nothing here is collective, so rank 0 may do it and the others not."""
    ours = fastddp.wrap(Net(), engine=engine)
    if rank == 0:
        x = torch.ones(1, 2, requires_grad=True)
        weight = ours.layer.weight
        (of_input,) = torch.autograd.grad(ours(x).sum(), x)
        assert torch.equal(of_input, weight.detach())
        (of_weight,) = torch.autograd.grad(ours(x).sum(), weight)
        assert torch.equal(of_weight, x.detach())
        ours(x).sum().backward(inputs=[x])
        assert torch.equal(x.grad, weight.detach())
        assert weight.grad is None
        ours.requires_grad_(False)
        ours(x).sum().backward()
        ours.requires_grad_(True)
        with ours.no_sync():
            ours(x).sum().backward()
        ours.zero_grad()
        assert ours.stats().rounds == 0
    ours(torch.full((1, 2), float(rank))).sum().backward()
    assert ours.stats().rounds == 1
    assert ours.layer.weight.grad.unique().item() == (world_size - 1) / 2


def test_one_rank_may_differentiate_alone(engine: str) -> None:
    run_ranks(_one_rank_alone, 2, engine)


def _no_parameter_on_one_rank(rank: int, world_size: int, engine: str, kind: str) -> None:
    """Rank 0's backward goes through an output but reaches no parameter."""
    wraps: dict[str, tuple[Callable[[Tensor], object], Callable[..., Tensor]]] = {
        "tensor": (lambda y: y, lambda out: out),
        "tuple": (lambda y: (y, None), lambda out: out[0]),
        "nested": (lambda y: {"a": [None, {"b": y}]}, lambda out: out["a"][1]["b"]),
        "dataclass": (lambda y: Output(y, (y.detach(),)), lambda out: out.logits),
    }
    wrap_output, unwrap = wraps[kind]
    net = Net(wrap_output)
    ours = fastddp.wrap(net, engine=engine)
    x = torch.ones(1, 2, requires_grad=True)
    if rank == 0:
        net.layer.forward = lambda t: t[:, :1] * 2
    for _ in range(3):
        ours.zero_grad()
        unwrap(ours(x)).sum().backward()
        assert ours.layer.weight.grad.unique().item() == (world_size - 1) / world_size
    assert ours.stats().rounds == 3


@pytest.mark.parametrize("kind", ["tensor", "tuple", "nested", "dataclass"])
def test_a_rank_that_reaches_no_parameter_takes_part(engine: str, kind: str) -> None:
    run_ranks(_no_parameter_on_one_rank, 2, engine, kind)


def _two_models(rank: int, world_size: int, engine: str) -> None:
    """A backward through two wrapped models is a round of each."""
    first, second = (fastddp.wrap(Net(), engine=engine) for _ in range(2))
    for model in (first, second):
        nn.init.ones_(model.layer.weight)
    for step in range(3):
        for model in (first, second):
            model.zero_grad()
        hidden = first(torch.full((1, 2), float(rank)))
        second(hidden.expand(1, 2)).sum().backward()
        assert first.layer.bias.grad.item() == 2.0
        assert first.layer.weight.grad.unique().item() == world_size - 1.0
        assert first.stats().rounds == second.stats().rounds == step + 1
    both = torch.cat([first.layer.weight.grad.flatten(), second.layer.weight.grad.flatten()])
    from_rank_0 = both.clone()
    dist.broadcast(from_rank_0, 0)
    assert torch.equal(both, from_rank_0)


def test_two_models_in_one_backward(engine: str) -> None:
    run_ranks(_two_models, 2, engine)


def test_tensors_are_found_in_any_nesting():
    a, b, c, d = (torch.full((), float(i)) for i in range(4))
    output = [a, {"x": (b, "text", None), "y": Output(c, (d,))}, 7, Output]
    assert [t.item() for t in tensors_in(output)] == [0.0, 1.0, 2.0, 3.0]


class Lazy(nn.Module):
    """Its gradients reach the parameters as lazy conjugates and negatives: bits, not values."""

    def __init__(self) -> None:
        super().__init__()
        self.conjugated = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        self.imaginary = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conjugated.conj() * x
        return (y.real + y.imag + torch.complex(self.imaginary, self.imaginary).conj().imag).sum()


def _lazy_gradients(rank: int, world_size: int, engine: str) -> None:
    ours, plain = fastddp.wrap(Lazy(), engine=engine), Lazy()
    inputs = [torch.tensor([1.0 + r, 2.0j + r]) for r in range(world_size)]
    ours(inputs[rank]).backward()
    (sum(plain(x) for x in inputs) / world_size).backward()
    for name, param in plain.named_parameters():
        assert torch.equal(ours.get_parameter(name).grad, param.grad), name


def test_lazy_conjugates_are_resolved(engine: str) -> None:
    run_ranks(_lazy_gradients, 2, engine)
