"""The modes of the caller, such as autocast, hold in the threads of the replicas."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddp
from tests.data_parallel.common import TWO, Call, spread
from tests.models import ConvNet


def _modes_inside(module: Call, x: Tensor) -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        "cache": torch.is_autocast_cache_enabled(),
        "default": torch.get_default_dtype(),
        "product": (module.net(x)).dtype,
    }


@pytest.mark.parametrize(
    "mode",
    [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    ],
    ids=["grad", "no_grad", "inference", "bfloat16", "float16"],
)
def test_the_callers_modes_hold_in_the_replicas(mode: Callable[[], Any]) -> None:
    model = spread(_modes_inside, net=nn.Linear(2, 2))
    model(torch.ones(4, 2))  # the threads exist, in no mode
    with mode():
        assert model(torch.ones(4, 2)) == _modes_inside(model.module, torch.ones(4, 2))
    assert model(torch.ones(4, 2))["grad"]


def test_a_default_dtype_holds_in_the_replicas() -> None:
    model = spread(_modes_inside, net=nn.Linear(2, 2))
    torch.set_default_dtype(torch.float64)
    try:
        assert model(torch.ones(4, 2, dtype=torch.float32))["default"] == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_training_may_follow_a_forward_without_gradients(first: Callable[[], Any]) -> None:
    model = fastddp.DataParallel(ConvNet(), TWO)
    with first():
        assert not model(torch.randn(4, 3, 8, 8)).requires_grad
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_run_once_per_replica_and_the_wrappers_once() -> None:
    model = fastddp.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), TWO)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("wrapper"))
    model.module.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.module[0].register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    model.module[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model(torch.ones(4, 2, requires_grad=True)).sum().backward()
    counts = {call: calls.count(call) for call in calls}
    assert counts == {"wrapper": 1, "before": 2, "Linear": 2, "backward": 2}


def test_the_intra_op_threads_are_divided_and_the_callers_kept() -> None:
    model = spread(lambda _, x: torch.full_like(x, torch.get_num_threads()))
    for total, share in ((4, 2), (5, 2), (1, 1), (6, 3)):
        torch.set_num_threads(total)
        assert model(torch.zeros(2)).tolist() == [share, share]
        assert torch.get_num_threads() == total
        late: list[int] = []
        thread = threading.Thread(
            target=lambda into: into.append(torch.get_num_threads()), args=[late]
        )
        thread.start()
        thread.join()
        assert late == [total], "a thread that begins later is not affected"
