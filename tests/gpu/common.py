"""What the tests on GPUs share: marks, delays, what a device was given to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)
BACKEND = "nccl"

ONE_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# Autograd has a parameter's gradient node run on the stream that was current when the module was
# wrapped, and says so where the model runs on another one. That is what some tests are about.
other_streams = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")


def delay() -> None:
    """Keep the current stream busy for some 20 ms; the host goes on at once."""
    torch.cuda._sleep(40_000_000)


class Late(torch.autograd.Function):
    """The identity, whose gradient is NaN until its stream has done what comes before it.

    A reader that does not wait for this stream is sure to be too early.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        late = torch.full_like(grad, torch.nan)
        delay()
        return late.copy_(grad)


def device_events(run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Return the name, begin and end (us) of each kernel and copy on a GPU, by their begin."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found = [(event.name, event.time_range.start, event.time_range.end) for event in on_device]
    return sorted(found, key=lambda event: event[1])


def is_kernel(name: str) -> bool:
    """Tell a kernel from a copy, a fill by the driver, and what a profiler adds."""
    return not name.startswith(("Memcpy", "Memset", "ProfilerStep"))
