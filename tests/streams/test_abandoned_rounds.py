"""A round that its backward has left by an exception is over before what the model does next.

On a device autograd runs backward in a thread of its own, and that thread may be the last to let go
of a backward that raised: the round is then abandoned, and what is left of it launched, while the
caller goes on. Other ranks have launched it before their next forward.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

from fastddp.ddp import join
from tests.ranks import run_ranks
from tests.streams import device
from tests.streams.group import RecordingGroup
from tests.streams.programs import SETTLED, Fragile, Trained

TRIALS = 30  # which thread is the last is chance


class Slow(RecordingGroup):
    """Takes long to launch an all-reduce in autograd's thread, as when the machine is busy."""

    is_slow = False

    def allreduce(self, *args: Any) -> Any:
        if self.is_slow and threading.current_thread() is not threading.main_thread():
            time.sleep(0.002)
        return super().allreduce(*args)


def _forward(trained: Trained, x: Tensor) -> None:
    trained.model(x)


def _forward_in_join(trained: Trained, x: Tensor) -> None:
    """What a rank launches before a forward inside `join`, but for the context's own."""
    replica = trained.model._replica
    with mock.patch.object(Join, "notify_join_context", return_value=None):
        join.before_forward(trained.model, replica, True)
    replica.decides_at_forward = False


def _orders(
    rank: int, world_size: int, engine: str, goes_on: Callable[[Trained, Tensor], None], **of: str
) -> list[list[str]]:
    """Returns, of each trial in which they were not as they should be, the collectives."""
    device.load()
    model = Fragile()
    model.norm = nn.BatchNorm1d(16)  # so that forward broadcasts buffers
    on_cpu = copy.deepcopy(model)
    model = model.to(device.NAME)
    delay: dict[str, Any] = {}
    if of:
        name = of["delayed"]
        delay["delay_all_reduce_named_params"] = [(name, model.get_parameter(name))]
        delay["param_to_hook_all_reduce"] = model.get_parameter(of["trigger"])
    trained = Trained(engine, model, on_cpu=on_cpu, group=Slow(size=4), **delay)
    for _ in range(SETTLED):
        trained.backward()
        trained.step()
    num_reduced = trained.num_buckets() + len(of) // 2
    model.breaks = True
    x = torch.ones(6, 8, device=device.NAME)
    orders = []
    for _ in range(TRIALS):
        begin = len(trained.group.log)
        trained.group.is_slow = False
        loss = trained.model(x).sum()
        loss.register_hook(lambda _: setattr(trained.group, "is_slow", True))
        with contextlib.suppress(ArithmeticError):
            loss.backward()
        goes_on(trained, x)
        deadline = time.monotonic() + 10
        while len(trained.group.log) < begin + num_reduced + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        log = trained.group.log[begin:]
        ops = [e.op if e.numel > 1 else "to agree" for e in log]
        if ops[: num_reduced + 1] != ["broadcast", *["allreduce"] * num_reduced]:
            orders.append(ops)
    return orders


@pytest.mark.parametrize("goes_on", [_forward, _forward_in_join])
def test_an_abandoned_round_comes_before_the_next_forward(
    engine: str, goes_on: Callable[[Trained, Tensor], None]
) -> None:
    assert run_ranks(_orders, 1, engine, goes_on, init_group=False) == [[]]


def _delayed(rank: int, world_size: int, engine: str) -> list[list[str]]:
    return _orders(rank, 1, engine, _forward, delayed="narrow.weight", trigger="last.weight")


def test_so_do_delayed_gradients(engine: str) -> None:
    assert run_ranks(_delayed, 1, engine, init_group=False) == [[]]
