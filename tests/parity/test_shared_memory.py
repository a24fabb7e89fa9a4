"""What `wrap` makes of a group whose ranks share a host, and when its buckets are launched."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp.comm import launch, shm
from tests import ranks
from tests.conftest import require_native
from tests.ranks import run_ranks

ROUNDS = 26


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def _lies_in_a_heap(tensor: torch.Tensor) -> bool:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return "memfd:fastddp-heap" in line
    return False


def _train(rank: int, engine: str, rounds: int) -> tuple[nn.Module, list[bool], list[torch.Tensor]]:
    model = fastddp.wrap(_model(), engine=engine, bucket_cap_mb=0.002)
    overlapped, gradients = [], []
    torch.manual_seed(rank)
    x = torch.randn(3, 16)
    for _ in range(rounds):
        model.zero_grad()
        model(x).square().mean().backward()
        overlapped.append(model.stats().overlaps)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return model, overlapped, gradients


def _on_gloo(rank: int, world_size: int, engine: str, shared: bool) -> None:
    model, overlapped, gradients = _train(rank, engine, ROUNDS)
    assert dist.get_backend() == "gloo"
    assert all(_lies_in_a_heap(param.grad) == shared for param in model.parameters())
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    if shared:
        # The order is learned in the first round, its plan is installed in the second.
        assert overlapped[1:11] == [False, True] * 5
        assert len(set(overlapped[12:])) == 1
    else:
        assert all(overlapped)


@pytest.mark.parametrize("world_size", [2, 3])
def test_buckets_lie_where_all_ranks_can_reach_them(engine: str, world_size: int) -> None:
    require_native()
    run_ranks(_on_gloo, world_size, engine, True)


def test_it_can_be_turned_off(engine: str) -> None:
    run_ranks(_on_gloo, 2, engine, False, env={"FASTDDP_SHM": "0"})


def _mixed_engines(rank: int, world_size: int) -> list[float]:
    _, _, gradients = _train(rank, ("native", "python")[rank % 2], ROUNDS)
    return torch.stack(gradients).unique(dim=0).flatten().tolist()


def test_engines_that_choose_for_themselves_stay_in_step() -> None:
    require_native()
    first, *others = run_ranks(_mixed_engines, 3)
    assert all(other == first for other in others)
    assert len(first) == sum(p.numel() for p in _model().parameters())


def _default_group(rank: int, world_size: int) -> None:
    ranks.init_group(launch.default_backend())
    assert dist.get_backend() == "shm"
    x = torch.ones(3)
    dist.all_reduce(x)
    assert x.tolist() == [world_size] * 3
    model, _, _ = _train(rank, "native", 3)
    assert all(_lies_in_a_heap(param.grad) for param in model.parameters())


def test_the_default_backend_shares_memory() -> None:
    require_native()
    run_ranks(_default_group, 2, init_group=False)


def _sub_groups(rank: int, world_size: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for _ in range(2):  # the second model finds the counterpart that the first one made
        model = fastddp.wrap(_model(), process_group=pairs[rank // 2])
        for _ in range(3):
            model.zero_grad()
            model(torch.full((1, 16), float(rank))).sum().backward()
        assert all(_lies_in_a_heap(param.grad) for param in model.parameters())
        expected = _model()
        ours = [2 * (rank // 2), 2 * (rank // 2) + 1]
        (sum(expected(torch.full((1, 16), float(r))).sum() for r in ours) / 2).backward()
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_each_sub_group_has_its_own(engine: str) -> None:
    require_native()
    run_ranks(_sub_groups, 4, env={"FASTDDP_ENGINE": engine})


def _memory_after(rank: int, world_size: int) -> list[int]:
    used = []
    for _ in range(4):
        model, _, gradients = _train(rank, "native", 3)
        del model, gradients
        used.append(fastddp.extension.load().shm_heap_used())
    return used


def test_a_model_that_is_dropped_gives_its_memory_back() -> None:
    require_native()
    for used in run_ranks(_memory_after, 2):
        assert used == [used[0]] * 4


class _InOrder(nn.Module):
    """Whose gradients arrive in the order of registration, so that the second plan is another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


def _ends_of_gradients(rank: int, world_size: int, engine: str) -> list[int]:
    """By round, where the last of them ends in memory."""
    model = fastddp.wrap(_InOrder(), engine=engine, bucket_cap_mb=0.05)
    ends, plans = [], []
    for _ in range(3):
        model(torch.ones(2, 64)).sum().backward()
        assert all(_lies_in_a_heap(param.grad) for param in model.parameters())
        ends.append(max(param.grad.data_ptr() + param.grad.nbytes for param in model.parameters()))
        plans.append(model.plan())
        model.zero_grad()
    assert plans[0] != plans[1]
    return ends


def test_the_buckets_of_the_first_plan_make_way_for_those_of_the_second(engine: str) -> None:
    require_native()
    for first, second, third in run_ranks(_ends_of_gradients, 2, engine):
        assert second <= first + 8 * 4096, "a page or two for each bucket"
        assert third == second


def test_a_wrong_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "FASTDDP_SHM", "yes")
    with pytest.raises(ValueError, match=r"FASTDDP_SHM='yes' is not one of 0, 1"):
        shm.why_not()


def _towers(rank: int, world_size: int, engine: str) -> None:
    """Two models of one shape in one backward; each rank would find another schedule faster."""
    torch.manual_seed(0)
    towers = [fastddp.wrap(nn.Linear(300, 300), engine=engine) for _ in range(2)]
    for step in range(ROUNDS):
        for tower in towers:
            tower.zero_grad()
        x = torch.full((2, 300), rank + 1.0, requires_grad=True)
        first, second = (tower(x).sum() for tower in towers)
        if step % 2 == rank:  # what one rank finds slow the other finds fast
            second.register_hook(lambda grad: (time.sleep(0.003), grad)[1])
        (first + 10 * second).backward()
        mean = sum(r + 1.0 for r in range(world_size)) / world_size
        for tower, factor in zip(towers, (1, 10), strict=True):
            assert tower.weight.grad.unique().tolist() == [2 * factor * mean], step
    overlaps = torch.tensor([float(tower.stats().overlaps) for tower in towers])
    all_overlaps = [torch.empty(2) for _ in range(world_size)]
    dist.all_gather(all_overlaps, overlaps)
    assert all(torch.equal(theirs, overlaps) for theirs in all_overlaps)


def test_ranks_launch_at_the_same_time_though_they_find_different_times_faster(engine: str) -> None:
    require_native()
    run_ranks(_towers, 2, engine)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def _own_collective(rank: int, world_size: int, engine: str) -> None:
    ranks.init_group("shm")
    model = fastddp.wrap(
        nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 1)), engine=engine, bucket_cap_mb=0.001
    )
    for step in range(ROUNDS):
        model.zero_grad()
        x = torch.full((1, 40), float(rank), requires_grad=True)
        hidden = _SumOverRanks.apply(model.module[0](x))
        if step % 2 == rank:
            hidden.register_hook(lambda grad: (time.sleep(0.003), grad)[1])
        model.module[1](hidden).sum().backward()
        assert model.module[1].bias.grad.tolist() == [1.0]


def test_collectives_of_the_users_in_backward_keep_their_place(engine: str) -> None:
    require_native()
    run_ranks(_own_collective, 2, engine, init_group=False)


def _without_init_sync(rank: int, world_size: int) -> None:
    x = torch.ones(2)
    if rank == 0:
        model = fastddp.wrap(_model(), init_sync=False)
        dist.all_reduce(x)
    else:
        dist.all_reduce(x)
        model = fastddp.wrap(_model(), init_sync=False)
    model(torch.full((1, 16), float(rank))).sum().backward()
    assert not any(_lies_in_a_heap(param.grad) for param in model.parameters())


def test_without_init_sync_ranks_wrap_when_they_like() -> None:
    run_ranks(_without_init_sync, 2)
