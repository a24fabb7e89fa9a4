"""`DataParallel` on CPU replicas, against the same pieces run one after the other in one thread.

torch's own class passes a call through where there is no GPU, so that it cannot be the reference
here: what it promises is computed by hand. With two GPUs, it is: `tests/gpu`. Replicas with copies
of the parameters, as on GPUs, are in `test_copies.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastddp
from tests.models import CASES, loss_of
from tests.parity.checks import assert_same_bits, bits, gradients

CPU = torch.device("cpu")

TWO, THREE, FOUR = (["cpu"] * count for count in (2, 3, 4))


class Scale(nn.Module):
    """The gradient of its parameter is the sum over the batch of whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.weight * x * self.gain


class Call(nn.Module):
    """Runs a function as its forward, with itself as the first argument."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def spread(function: Callable[..., Any], devices: list[str] = TWO, **parts: nn.Module) -> Any:
    return fastddp.DataParallel(Call(function, **parts), devices)


def one_by_one(
    model: nn.Module, inputs: tuple[Tensor, ...], count: int
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return what torch's class promises: the joint output, and gradients added in replica order.

    The first piece runs the model itself, the others copies of its buffers.
    """
    pieces = list(zip(*(tensor.chunk(count) for tensor in inputs), strict=True))
    params = dict(model.named_parameters())
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = [model(*pieces[0])]
    for piece in pieces[1:]:
        own = {name: buffer.clone() for name, buffer in start.items()}
        outputs.append(functional_call(model, params | own, piece))
    joint = torch.cat(outputs).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(joint), joint)
    totals: dict[str, Tensor | None] = dict.fromkeys(params)
    wanted = [name for name, param in params.items() if param.requires_grad]
    for output, piece_grad in zip(outputs, grad.split([len(o) for o in outputs]), strict=True):
        found = torch.autograd.grad(
            output, [params[name] for name in wanted], piece_grad, allow_unused=True
        )
        for name, part in zip(wanted, found, strict=True):
            total = totals[name]
            if part is not None:
                totals[name] = part if total is None else total + part
    return joint.detach(), totals


def assert_bits_of_pieces(name: str, devices: list[str]) -> None:
    """Compare a model of `CASES`, on replicas, with its pieces one by one."""
    case = CASES[name]
    model, reference = case.build(), case.build()
    ours = fastddp.DataParallel(model, devices)
    for step in range(2):
        inputs = case.whole_batch(2, step)
        model.zero_grad()
        output = ours(*inputs)
        loss_of(output).backward()
        want_output, want = one_by_one(reference, inputs, len(devices))
        assert bits(output) == bits(want_output)
        assert_same_bits(gradients(model), want, f"step {step}")
        assert_same_bits(dict(model.named_buffers()), dict(reference.named_buffers()), "buffers")
