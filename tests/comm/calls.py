"""Collectives as functions of a group, for tests that have ranks call different ones."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

DEADLINE_S = 20.0  # a mismatch is found at once, not by a timeout

Collective = Callable[[dist.ProcessGroup], object]


def all_reduce(
    numel: int, dtype: torch.dtype = torch.float32, op: dist.ReduceOp = dist.ReduceOp.SUM
) -> Collective:
    return lambda group: dist.all_reduce(torch.ones(numel, dtype=dtype), op=op, group=group)


def broadcast(numel: int, root: int = 0) -> Collective:
    return lambda group: dist.broadcast(torch.ones(numel), group_src=root, group=group)


def all_gather(numel: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        dist.all_gather_into_tensor(
            torch.ones(numel * group.size()), torch.ones(numel), group=group
        )

    return call


def reduce_scatter(numel: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        out, flat = torch.ones(numel), torch.ones(numel * group.size())
        dist.reduce_scatter_tensor(out, flat, group=group)

    return call


def barrier(group: dist.ProcessGroup) -> None:
    dist.barrier(group=group)


ALL_REDUCE = "all.?reduce"


def says(message: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, message, re.IGNORECASE), f"no {pattern!r} in {message!r}"


def wait_for(files: list) -> None:
    until = time.monotonic() + DEADLINE_S
    while not all(file.exists() for file in files):
        assert time.monotonic() < until, files
        time.sleep(0.005)
