"""A model with collectives of its own, such as those of SyncBatchNorm, among the engine's."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fastddp
from tests.ranks import run_ranks


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over all ranks; so is the mean of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return _mean(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return _mean(grad)


def _mean(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


class Centred(nn.Module):
    """Layers that each subtract the mean of the whole batch, over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
            x = x - _MeanOverRanks.apply(x.mean(dim=0))
        return x


def trains_as_with_torch(rank: int, world_size: int, engine: str) -> None:
    torch.manual_seed(0)
    model = Centred()
    # Two layers to a bucket: reductions begin between the model's own collectives.
    cap_mb = 2 * (8 * 8 + 8) * 4 / 2**20
    theirs = nn.parallel.DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=cap_mb)
    ours = fastddp.DistributedDataParallel(model, bucket_cap_mb=cap_mb, engine=engine)
    for step in range(4):
        torch.manual_seed(step * world_size + rank)
        x = torch.randn(5, 8)
        for wrapped in (theirs, ours):
            wrapped.zero_grad()
            wrapped(x).square().sum().backward()
        for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, msg=f"step {step}, {name}")
    assert len(ours.plan().buckets) > 2


def test_collectives_within_backward(engine: str) -> None:
    run_ranks(trains_as_with_torch, 2, engine)
