"""A call of `fastddp.spawn` that cannot work is refused before a rank starts."""

from __future__ import annotations

import threading

import pytest
import torch

import fastddp
from tests.spawn.common import alone


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fn": 3}, TypeError, "expected a function, got int"),
        ({"args": (threading.Lock(),)}, TypeError, "by pickle; .*cannot pickle '_thread.lock'"),
        ({"args": 3}, TypeError, r"args=3 is not a tuple; for one argument, \(argument,\)"),
        ({"nprocs": (1,)}, TypeError, r"nprocs=\(1,\) is not a number. The order is spawn\("),
        ({"nprocs": 0}, ValueError, "nprocs=0, less than 1"),
        ({"timeout_s": 0.0}, ValueError, "timeout_s=0.0 is not a time"),
    ],
)
def test_a_call_that_cannot_work(options, error, text, fast_start):
    with pytest.raises(error, match=text):
        fastddp.spawn(**{"fn": alone, **options})


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"nprocs=2, but there are 1 GPU.*CUDA_VISIBLE_DEVICES=''"):
        fastddp.spawn(alone, 2)
    monkeypatch.undo()
