"""Futures that a hook returned and nobody completes end at the group's timeout, with a message."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

import fastddp
from tests.ranks import run_ranks


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: float) -> Tensor:
        self.seen += 1
        return self.weight * x


def _never_completed(rank: int, world_size: int, engine: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    done: Future[Any] = Future()
    done.set_result([])
    for futures in ([Future()], Future(), [done, Future()]):
        model = fastddp.DistributedDataParallel(Counter(), engine=engine, process_group=group)
        returned = [futures]
        model._register_buffer_comm_hook(returned, lambda state, _: state[0])
        with pytest.raises(RuntimeError, match=rf"rank {rank}.*buffer hook.*0\.5 s.*set_result"):
            model(2.0 * rank).backward()
        # The next one is not held up by what was given up.
        returned[0] = None
        model.zero_grad()
        model(2.0 * rank).backward()
        assert model.module.weight.grad.item() == 1.0

    model = fastddp.DistributedDataParallel(Counter(), engine=engine, process_group=group)
    model.register_comm_hook(None, lambda _state, _bucket: Future())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"communication hook.*bucket 1.*0\.5 s.*set_result"):
            model(2.0 * rank).backward()


def test_futures_that_are_never_completed(engine: str) -> None:
    run_ranks(_never_completed, 2, engine)
