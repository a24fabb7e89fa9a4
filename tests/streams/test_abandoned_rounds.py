"""A round that its backward has left by an exception is over before what the model does next.

On a device autograd runs backward in a thread of its own, and that thread may be the last to let go
of a backward that raised: the round is then abandoned, and what is left of it launched, while the
caller goes on. Other ranks have launched it before their next forward.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import torch
from torch import nn

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


def _orders(rank: int, world_size: int, engine: str) -> list[list[str]]:
    """Returns what was launched in the backward that raised and in the forward after it."""
    device.load()
    model = Fragile()
    model.norm = nn.BatchNorm1d(16)  # so that forward broadcasts buffers
    trained = Trained(engine, model, group=Slow(size=4))
    for _ in range(SETTLED):
        trained.backward()
        trained.step()
    num_buckets, model.breaks = trained.num_buckets(), True
    x = torch.ones(6, 8, device=device.NAME)
    orders = []
    for _ in range(TRIALS):
        begin = len(trained.group.log)
        trained.group.is_slow = False
        loss = trained.model(x).sum()
        loss.register_hook(lambda _: setattr(trained.group, "is_slow", True))
        with contextlib.suppress(ArithmeticError):
            loss.backward()
        trained.model(x)
        deadline = time.monotonic() + 10
        while len(trained.group.log) < begin + num_buckets + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        orders.append([entry.op for entry in trained.group.log[begin:]])
    expected = ["broadcast", *["allreduce"] * num_buckets, "broadcast"]
    return [order for order in orders if order != expected]


def test_an_abandoned_round_comes_before_the_next_forward(engine: str) -> None:
    assert run_ranks(_orders, 1, engine, init_group=False) == [[]]
