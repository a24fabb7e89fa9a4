"""A whole training step as one CUDA graph, on one rank of an NCCL group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastddp
from tests.gpu.common import DEVICE, ONE_GPU
from tests.models import CASES, loss_of

pytestmark = [*ONE_GPU, pytest.mark.usefixtures("one_rank")]

WARM_UP = 2  # backwards: the first learns the order of gradients, the second has the buckets


def make(dtype: torch.dtype | None = None) -> nn.Module:
    return CASES["mlp"].build(dtype).to(DEVICE)


def inputs(step: int) -> Tensor:
    return CASES["mlp"].inputs(0, step)[0].to(DEVICE)


class Step:
    """One step on a static input, eager until it is captured."""

    def __init__(self, model: nn.Module, stream: torch.cuda.Stream, *, autocast: bool = False):
        self.model = model
        self.stream = stream
        self.autocast = autocast
        self.x = inputs(0)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.graph: torch.cuda.CUDAGraph | None = None

    def body(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        # Without the cache, which would outlive a capture.
        with torch.autocast(DEVICE.type, torch.bfloat16, self.autocast, cache_enabled=False):
            loss = loss_of(self.model(self.x))
        loss.backward()
        self.optimizer.step()

    def capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events in a thread of its own meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.body()

    def __call__(self, number: int) -> list[Tensor]:
        """Return the parameters after it."""
        self.x.copy_(inputs(number))
        self.stream.wait_stream(torch.cuda.current_stream())
        if self.graph is not None:
            self.graph.replay()
        else:
            with torch.cuda.stream(self.stream):
                self.body()
        torch.cuda.current_stream().wait_stream(self.stream)
        return [param.detach().clone() for param in self.model.parameters()]


def wrapped(engine: str, stream: torch.cuda.Stream, **options: object) -> nn.Module:
    """Wrap on the stream of the capture: gradients are added up on the stream of wrapping."""
    with torch.cuda.stream(stream):
        return fastddp.DistributedDataParallel(
            make(), engine=engine, bucket_cap_mb=0.0001, **options
        )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_replayed_step_has_the_bits_of_an_eager_one(engine: str, autocast: bool) -> None:
    stream = torch.cuda.Stream(DEVICE)
    eager = Step(make(), stream, autocast=autocast)
    model = wrapped(engine, stream)
    step = Step(model, stream, autocast=autocast)
    for number in range(WARM_UP):
        assert_equal(step(number), eager(number))
    step.capture()
    for number in range(WARM_UP, WARM_UP + 5):
        assert_equal(step(number), eager(number))
    torch.cuda.synchronize()
    assert len(model.plan().buckets) > 1


def test_a_graph_in_reduced_precision(engine: str) -> None:
    stream = torch.cuda.Stream(DEVICE)
    eager = Step(wrapped(engine, stream, comm_dtype=torch.bfloat16), stream)
    step = Step(wrapped(engine, stream, comm_dtype=torch.bfloat16), stream)
    for number in range(WARM_UP):
        assert_equal(step(number), eager(number))
    step.capture()
    for number in range(WARM_UP, WARM_UP + 3):
        assert_equal(step(number), eager(number))


def test_eager_steps_may_follow_a_graphs(engine: str) -> None:
    stream = torch.cuda.Stream(DEVICE)
    eager, step = Step(make(), stream), Step(wrapped(engine, stream), stream)
    for number in range(WARM_UP):
        assert_equal(step(number), eager(number))
    step.capture()
    assert_equal(step(WARM_UP), eager(WARM_UP))
    graph, step.graph = step.graph, None
    assert_equal(step(WARM_UP + 1), eager(WARM_UP + 1))
    step.graph = graph
    assert_equal(step(WARM_UP + 2), eager(WARM_UP + 2))


def test_a_capture_without_a_warm_up_says_what_to_do(engine: str) -> None:
    stream = torch.cuda.Stream(DEVICE)
    step = Step(wrapped(engine, stream), stream)
    with pytest.raises(RuntimeError) as caught:
        step.capture()
    # What ends the capture may have complained on top.
    said = f"{caught.value} {caught.value.__context__}"
    assert "run it two times before the capture" in said
    torch.cuda.synchronize()


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (mine, due) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine, due), f"parameter {index}: {mine} and {due}"
