"""Gradients from several streams: nothing is read before it is there, or written while it is read.

All on one rank of an NCCL group. Nothing here waits for the device before it looks: what is checked
is what a training loop on the current stream would see.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

import fastddp
from tests.gpu.common import DEVICE, ONE_GPU, Late, other_streams

pytestmark = [*ONE_GPU, pytest.mark.usefixtures("one_rank"), other_streams]

WIDTH, BRANCHES, STEPS = 64, 4, 4


class Branches(nn.Module):
    """Each branch runs on a stream of its own, and its gradients come late."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(BRANCHES)
        )
        self.biases = nn.ParameterList(torch.zeros(WIDTH) for _ in range(BRANCHES))
        self.streams = [torch.cuda.Stream(DEVICE) for _ in range(BRANCHES)]

    def forward(self, x: Tensor) -> Tensor:
        here = torch.cuda.current_stream()
        outputs = []
        for weight, bias, stream in zip(self.weights, self.biases, self.streams, strict=True):
            stream.wait_stream(here)
            x.record_stream(stream)
            with torch.cuda.stream(stream):
                y = functional.linear(x, Late.apply(weight), Late.apply(bias))
                outputs.append(torch.tanh(y))
        for output, stream in zip(outputs, self.streams, strict=True):
            here.wait_stream(stream)
            output.record_stream(here)
        return sum(outputs)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, WIDTH, generator=generator).to(DEVICE) for _ in range(STEPS)]


def trained(model: nn.Module, *, stream: torch.cuda.Stream | None = None) -> list[Tensor]:
    """Take some steps of SGD; return copies of all gradients, made as soon as backward returns."""
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = batches()
    with torch.cuda.stream(stream):
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream(DEVICE))
        for x in inputs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            seen += [param.grad.clone() for param in model.parameters()]
            optimizer.step()
    torch.cuda.synchronize()
    return seen


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (mine, due) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine, due), f"gradient {index} of {len(want)}: {mine} and {due}"


def wrapped(engine: str, cap_mb: float, **options: object) -> nn.Module:
    return fastddp.DistributedDataParallel(
        Branches().to(DEVICE), engine=engine, bucket_cap_mb=cap_mb, **options
    )


def wrapped_with_streams_of_its_own(engine: str, cap_mb: float) -> nn.Module:
    """Have the gradients of each branch summed up, and so taken, on the stream of the branch."""
    module = Branches().to(DEVICE)
    torch.cuda.synchronize()
    nodes = []  # a node that exists when the module is wrapped keeps its stream
    for weight, bias, stream in zip(module.weights, module.biases, module.streams, strict=True):
        with torch.cuda.stream(stream):
            nodes += [get_gradient_edge(param).node for param in (weight, bias)]
    return fastddp.DistributedDataParallel(module, engine=engine, bucket_cap_mb=cap_mb)


# One bucket gets gradients from all streams, or each parameter has a bucket of its own.
@pytest.mark.parametrize("cap_mb", [25.0, 0.0001], ids=["one bucket", "many buckets"])
@pytest.mark.parametrize("wrap", [wrapped, wrapped_with_streams_of_its_own])
def test_a_bucket_waits_for_every_stream_that_fills_it(
    wrap: Callable[[str, float], nn.Module], engine: str, cap_mb: float
) -> None:
    model = wrap(engine, cap_mb)
    got = trained(model)
    assert model.stats().rounds == STEPS
    assert_equal(got, trained(Branches().to(DEVICE)))


def test_a_model_on_another_stream_than_the_default_one(engine: str) -> None:
    stream = torch.cuda.Stream(DEVICE)
    assert_equal(trained(wrapped(engine, 0.02), stream=stream), trained(Branches().to(DEVICE)))


def test_steps_may_change_streams(engine: str) -> None:
    model, plain = wrapped(engine, 0.02), Branches().to(DEVICE)
    streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]
    got, want = [], []
    inputs = batches()
    for number, x in enumerate(inputs):
        stream, other = streams[number % 2], streams[1 - number % 2]
        stream.wait_stream(other if number else torch.cuda.default_stream(DEVICE))
        with torch.cuda.stream(stream):
            model.zero_grad()
            model(x).square().mean().backward()
            got += [param.grad.clone() for param in model.parameters()]
        torch.cuda.synchronize()  # for the reference alone
        plain.zero_grad()
        plain(x).square().mean().backward()
        want += [param.grad.clone() for param in plain.parameters()]
    torch.cuda.synchronize()
    assert_equal(got, want)


def test_reduced_precision_waits_as_well(engine: str) -> None:
    got = trained(wrapped(engine, 0.02, comm_dtype=torch.bfloat16))[: 2 * BRANCHES]
    want = trained(Branches().to(DEVICE))[: 2 * BRANCHES]
    assert_equal(got, [grad.bfloat16().float() for grad in want])


def test_accumulated_gradients_of_several_streams(engine: str) -> None:
    model, plain = wrapped(engine, 0.02), Branches().to(DEVICE)
    first, second = batches()[:2]
    with model.no_sync():
        model(first).square().mean().backward()
    model(second).square().mean().backward()
    got = [param.grad.clone() for param in model.parameters()]
    torch.cuda.synchronize()
    for x in (first, second):
        plain(x).square().mean().backward()
    assert_equal(got, [param.grad for param in plain.parameters()])


def test_a_backward_that_raises_leaves_nothing_behind_on_any_stream(engine: str) -> None:
    model = wrapped(engine, 0.02)
    trained(model)  # from now on buckets are sent while backward goes on
    model.module.load_state_dict(Branches().state_dict())

    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    handle = model.module.weights[0].register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(batches()[0]).square().mean().backward()
    handle.remove()
    assert_equal(trained(model), trained(Branches().to(DEVICE)))
