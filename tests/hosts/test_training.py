"""Training in groups that span hosts: the gradients of plain gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp.comm import shm
from tests.hosts.common import CPU, backend_of, run_on_hosts
from tests.slow import slow_but_for


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 300), nn.Linear(300, 4)
    )


def _train(model: nn.Module, rank: int) -> list[torch.Tensor]:
    """Return the parameters after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def _compare(rank: int, world_size: int, engine: str) -> bytes:
    gloo = dist.new_group(backend="gloo")
    with_gloo = _train(nn.parallel.DistributedDataParallel(_model(), process_group=gloo), rank)
    torchs = _train(nn.parallel.DistributedDataParallel(_model()), rank)
    ours = _train(fastddp.wrap(_model(), engine=engine, bucket_cap_mb=0.1), rank)
    torch.testing.assert_close(torchs, with_gloo)
    torch.testing.assert_close(ours, with_gloo)
    return b"".join(parameter.numpy().tobytes() for parameter in ours + torchs)


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("hosts", slow_but_for(["aba"], ["aabb", "aba"]))
def test_training_equals_torch_on_gloo(engine, hosts, backend):
    assert len(set(run_on_hosts(_compare, hosts, engine, backend=backend))) == 1


def _whole_numbers(rank: int, world_size: int) -> None:
    model = nn.Linear(1000, 1200, bias=False)  # of two pieces
    wrapped = fastddp.wrap(model)
    for step in range(3):
        wrapped.zero_grad()
        wrapped(torch.full((1, 1000), float(4 * rank + step))).sum().backward()
        mean = sum(4 * other + step for other in range(world_size)) / world_size
        assert torch.equal(model.weight.grad, torch.full_like(model.weight, mean))
    backend = shm.counterpart(dist.group.WORLD, CPU)._get_backend(CPU)
    assert type(backend).__name__ == "ShmBackend"
    assert backend.spans_hosts


def test_gradients_are_exact_and_go_through_shared_memory():
    run_on_hosts(_whole_numbers, "abab", backend="gloo")


def _in_subgroups(rank: int, world_size: int) -> None:
    lists = [[0, 1, 2], [0, 2, 3], [0, 1, 2, 3]]
    groups = [dist.new_group(ranks, backend="gloo") for ranks in lists]
    # After this, ranks know of different numbers of groups. (With torch 2.14 they could not make
    # another one together: its names count the local ones too.)
    extra = (
        dist.new_group([1, 3], backend="gloo", use_local_synchronization=True) if rank % 2 else None
    )
    for ranks, group in zip(lists, groups, strict=True):
        if rank in ranks:
            wrapped = fastddp.wrap(nn.Linear(2, 2, bias=False), process_group=group)
            wrapped(torch.full((1, 2), float(12 * rank))).sum().backward()
            mean = sum(12 * other for other in ranks) / len(ranks)
            assert torch.equal(wrapped.weight.grad, torch.full((2, 2), mean))
            # Must do without the registry of torch.distributed: the group may be in none.
            assert backend_of(shm.counterpart(group, CPU)).spans_hosts == (ranks != [0, 1])
            del wrapped
            dist.destroy_process_group(group)
    del extra
    wrapped = fastddp.wrap(nn.Linear(2, 2, bias=False))
    wrapped(torch.full((1, 2), float(rank))).sum().backward()
    assert torch.equal(wrapped.weight.grad, torch.full((2, 2), 1.5))


def test_subgroups_of_gloo_have_counterparts_of_their_own():
    run_on_hosts(_in_subgroups, "aabb", backend="gloo")


def _again(rank: int, world_size: int) -> list[Any]:
    from tests.ranks import scratch_folder

    dist.destroy_process_group()
    values = []
    for attempt in range(3):
        dist.init_process_group(
            "shm",
            init_method=f"file://{scratch_folder()}/again{attempt}",
            rank=rank,
            world_size=world_size,
        )
        tensor = torch.full((3,), float(rank))
        dist.all_reduce(tensor)
        values.append(tensor.tolist())
        dist.barrier()
        dist.destroy_process_group()
    return values


def test_groups_are_destroyed_and_made_again():
    assert run_on_hosts(_again, "aab") == [[[3.0] * 3] * 3] * 3
