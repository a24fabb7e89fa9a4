"""Ranks that call different collectives: all raise and name both sides; nothing is overwritten."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastddp  # noqa: F401  # registers the backend
from tests.ranks import init_group, run_ranks

pytestmark = pytest.mark.usefixtures("needs_shm")

TOLD_WITHIN_S = 15.0  # before the group's timeout of 20 s, also on a machine under load
GUARD = 77.0
GUARD_NUMEL = 4096
CPU = torch.device("cpu")


class Place:
    """A group, and tensors with guards before and behind, in the heap or not."""

    def __init__(self, in_heap: bool) -> None:
        self.group = dist.new_group(backend="shm", timeout=timedelta(seconds=20))
        self._in_heap = in_heap
        self._wholes: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        total = numel + 2 * GUARD_NUMEL
        if self._in_heap:
            whole = self.group._get_backend(CPU).allocate_tensor(total, dtype=dtype, device=CPU)
        else:
            whole = torch.empty(total, dtype=dtype)
        whole.fill_(GUARD)
        self._wholes.append(whole)
        return whole[GUARD_NUMEL:-GUARD_NUMEL].fill_(1)

    def check_guards(self) -> None:
        for whole in self._wholes:
            assert bool((whole[:GUARD_NUMEL] == GUARD).all())
            assert bool((whole[-GUARD_NUMEL:] == GUARD).all())


Act = Callable[[Place], object]


@dataclass(frozen=True)
class Mismatch:
    name: str
    zero: Act
    """What rank 0 calls; all others the next."""
    others: Act
    text: str
    """What the error says: both sides."""


def all_reduce(numel: int, dtype: torch.dtype = torch.float32, op=dist.ReduceOp.SUM) -> Act:
    return lambda at: dist.all_reduce(at.take(numel, dtype), op, at.group)


def in_background(numel: int) -> Act:
    return lambda at: dist.all_reduce(at.take(numel), group=at.group, async_op=True).wait()


def broadcast(numel: int, root: int) -> Act:
    return lambda at: dist.broadcast(at.take(numel), root, at.group)


def all_gather(numel: int, ranks: int) -> Act:
    return lambda at: dist.all_gather_into_tensor(at.take(numel * ranks), at.take(numel), at.group)


def reduce_scatter(numel: int, ranks: int) -> Act:
    return lambda at: dist.reduce_scatter_tensor(
        at.take(numel), at.take(numel * ranks), group=at.group
    )


def barrier(at: Place) -> None:
    dist.barrier(at.group)


def mismatches(n: int, ranks: int) -> list[Mismatch]:
    f32 = torch.float32
    return [
        Mismatch(
            "size",
            all_reduce(n),
            all_reduce(n + 1),
            rf"rank 0 called all_reduce of {n} float32, sum, "
            rf"rank \d called all_reduce of {n + 1} float32, sum",
        ),
        Mismatch(
            "much smaller",
            all_reduce(n),
            all_reduce(1),
            rf"rank 0 called all_reduce of {n} float32, sum, "
            r"rank \d called all_reduce of 1 float32, sum",
        ),
        Mismatch(
            "in the background",
            in_background(n),
            in_background(n + 64),
            rf"rank 0 called all_reduce of {n} float32, sum, "
            rf"rank \d called all_reduce of {n + 64} float32, sum",
        ),
        Mismatch(
            "dtype",
            all_reduce(n, f32),
            all_reduce(n, torch.float64),
            rf"rank 0 called all_reduce of {n} float32, sum, "
            rf"rank \d called all_reduce of {n} float64, sum",
        ),
        Mismatch(
            "operation",
            all_reduce(n, f32, dist.ReduceOp.SUM),
            all_reduce(n, f32, dist.ReduceOp.MAX),
            rf"rank 0 called all_reduce of {n} float32, sum, "
            rf"rank \d called all_reduce of {n} float32, maximum",
        ),
        Mismatch(
            "root",
            broadcast(n, 0),
            broadcast(n, 1),
            rf"rank 0 called broadcast with root 0 of {n} float32, "
            rf"rank \d called broadcast with root 1 of {n} float32",
        ),
        Mismatch(
            "order",
            all_reduce(n),
            broadcast(n, 0),
            rf"rank 0 called all_reduce of {n} float32, sum, "
            rf"rank \d called broadcast with root 0 of {n} float32",
        ),
        Mismatch(
            "gathered sizes",
            all_gather(n, ranks),
            all_gather(2 * n, ranks),
            rf"rank 0 called all_gather of {n} float32, "
            rf"rank \d called all_gather of {2 * n} float32",
        ),
        Mismatch(
            "scattered and gathered",
            reduce_scatter(n, ranks),
            all_gather(n, ranks),
            rf"rank 0 called reduce_scatter of {n} float32, sum, "
            rf"rank \d called all_gather of {n} float32",
        ),
        Mismatch(
            "a barrier",
            barrier,
            all_reduce(n),
            rf"rank 0 called barrier, rank \d called all_reduce of {n} float32, sum",
        ),
    ]


def _disagree(rank: int, world_size: int, in_heap: bool, numel: int) -> list[str]:
    """Calls one mismatch after the other, each on a new group."""
    init_group("shm", 20)
    messages = []
    for mismatch in mismatches(numel, world_size):
        at = Place(in_heap)
        dist.all_reduce(torch.ones(3), group=at.group)
        began = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            (mismatch.zero if rank == 0 else mismatch.others)(at)
        assert time.monotonic() - began < TOLD_WITHIN_S
        with pytest.raises(RuntimeError, match="the ranks do not agree"):
            dist.barrier(at.group)  # for ever
        messages.append(str(caught.value))
        dist.barrier()
        at.check_guards()  # now that no other rank writes any more
        dist.destroy_process_group(at.group)
    return messages


@pytest.mark.parametrize("numel", [5, 3000, 300_000])
@pytest.mark.parametrize("in_heap", [False, True], ids=["outside", "heap"])
def test_all_raise_and_see_both_sides(in_heap: bool, numel: int) -> None:
    for rank, messages in enumerate(run_ranks(_disagree, 3, in_heap, numel, init_group=False)):
        for mismatch, message in zip(mismatches(numel, 3), messages, strict=True):
            head = rf"fastddp: rank {rank}: collective 2 \(.+\) failed: the ranks do not agree: "
            assert re.match(head + mismatch.text, message), (mismatch.name, message)
