"""Every rank issues the same collectives in the same order, whatever its own gradients' order."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddp
from tests.ranks import run_ranks
from tests.streams import device
from tests.streams.group import RecordingGroup

STEPS = 3


class Paths(nn.Module):
    """Layers of different sizes that each rank runs in an order of its own, one of them not at all.

    A rank that used the order in which its own gradients arrive would fill its buckets differently.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
            self.paths = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 3 + 2 * i), nn.Tanh(), nn.Linear(3 + 2 * i, 2))
                for i in range(8)
            )
            self.norm = nn.BatchNorm1d(2)
        self.order = random.Random(rank).sample(range(8), 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(sum(self.paths[i](x) for i in self.order))


def _train(rank: int, size: int, engine: str, replay: Sequence[Tensor]) -> RecordingGroup:
    group = RecordingGroup(rank, size, replay)
    model = fastddp.DistributedDataParallel(
        Paths(rank).to(device.NAME),
        process_group=group,
        engine=engine,
        bucket_cap_mb=0.0005,
        find_unused_parameters=True,
    )
    for _ in range(STEPS):
        model(torch.ones(5, 4, device=device.NAME)).sum().backward()
        model.zero_grad()
    return group


def _logs(
    rank: int, world_size: int, engine: str, size: int, ranks: Sequence[int], strays: bool
) -> list[Any]:
    """Is rank 0 and then each of these. If it ``strays``, they take another order than rank 0's."""
    device.load()
    first = _train(0, size, engine, ())
    sent = [t.flip(0) if strays and t.dtype == torch.int64 else t for t in first.sent]
    logs = [first.log] + [_train(other, size, engine, sent).log for other in ranks]
    findings = device.findings()
    assert not findings, "\n".join(found.text for found in findings)
    return [[(op, numel, str(dtype)) for op, numel, dtype in log] for log in logs]


@pytest.mark.parametrize("size", [2, 64, 1024])
def test_every_rank_issues_the_same_order(engine: str, size: int) -> None:
    ranks = sorted({1, size // 3, size // 2 + 1, size - 1} - {0, size})
    [logs] = run_ranks(_logs, 1, engine, size, ranks, False, init_group=False)
    assert len(logs) == 1 + len(ranks)
    for rank, log in zip((0, *ranks), logs, strict=True):
        assert log == logs[0], f"rank {rank} and rank 0"
    assert [op for op, *_ in logs[0]].count("allreduce") >= 5 * STEPS


def test_a_rank_with_another_order_is_seen(engine: str) -> None:
    """The test above can fail: without rank 0's order, ranks differ from the second step on."""
    [[first, other]] = run_ranks(_logs, 1, engine, 64, [5], True, init_group=False)
    assert other != first
    agreed = [op == "broadcast" and "int64" in dtype for op, _, dtype in first].index(True)
    assert other[: agreed + 1] == first[: agreed + 1]


def test_a_world_of_one_issues_nothing(engine: str) -> None:
    assert run_ranks(_logs, 1, engine, 1, [], False, init_group=False) == [[[]]]


def _fake_steps(rank: int, world_size: int, engine: str, claimed: int, size: int) -> Any:
    """Trains in torch's fake group, which reduces nothing: a sum is what this rank brought."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=claimed, world_size=size)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model = fastddp.DistributedDataParallel(
        copy.deepcopy(alone), engine=engine, bucket_cap_mb=0.0002, init_sync=False
    )
    for step in range(STEPS):
        x = torch.full((3, 4), step + 1.0)
        for trained in (model, alone):
            trained.zero_grad()
            trained(x).sum().backward()
        for param, own in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(param.grad * size, own.grad)
    assert model._replica.stats().rounds == STEPS
    plan = model._replica.plan()
    return [[(slot.param, slot.offset) for slot in b.slots] for b in plan.buckets]


def test_steps_in_a_fake_group_of_1024(engine: str) -> None:
    plans = [
        run_ranks(_fake_steps, 1, engine, rank, 1024, init_group=False)[0] for rank in (0, 1023)
    ]
    assert plans[0] == plans[1]
    assert len(plans[0]) > 1
