"""What gloo does in a group that spans hosts, and what hosts there are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.hosts.common import backend_of, given, reduced, run_on_hosts


def _others(rank: int, world_size: int) -> None:
    mine = given(rank, 10)
    everyone = [given(other, 10) for other in range(world_size)]
    tensor = mine.clone()
    dist.broadcast(tensor, 2)
    assert torch.equal(tensor, everyone[2])
    gathered = [torch.empty(10) for _ in range(world_size)]
    dist.all_gather(gathered, mine)
    assert torch.equal(torch.stack(gathered), torch.stack(everyone))
    joined = torch.empty(10 * world_size)
    dist.all_gather_into_tensor(joined, mine)
    assert torch.equal(joined, torch.cat(everyone))
    part = torch.empty(10)
    dist.reduce_scatter(part, [given(rank, 10) + k for k in range(world_size)])
    assert torch.equal(part, reduced(list(range(world_size)), 10) + rank * world_size)
    dist.reduce_scatter_tensor(part, mine.repeat(world_size))
    assert torch.equal(part, reduced(list(range(world_size)), 10))
    tensor = mine.clone()
    dist.reduce(tensor, 1)
    if rank == 1:
        assert torch.equal(tensor, reduced(list(range(world_size)), 10))
    dist.gather(mine, gathered if rank == 0 else None, dst=0)
    dist.scatter(part, everyone if rank == 0 else None, src=0)
    assert torch.equal(part, mine)
    swapped = torch.empty(world_size)
    dist.all_to_all_single(swapped, torch.arange(world_size) + 10.0 * rank)
    assert swapped.tolist() == [10.0 * other + rank for other in range(world_size)]
    if rank == 0:
        dist.send(mine, world_size - 1)
    elif rank == world_size - 1:
        dist.recv(part, 0)
        assert torch.equal(part, everyone[0])
    objects = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": other} for other in range(world_size)]
    sparse = torch.sparse_coo_tensor([[rank]], [1.0], (world_size,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [1.0] * world_size
    backend_of().monitored_barrier()
    dist.barrier()
    tensor = mine.clone()
    dist.all_reduce(tensor)  # and ours still goes
    assert torch.equal(tensor, reduced(list(range(world_size)), 10))


@pytest.mark.parametrize("hosts", ["aabb", "aab", "abab"])
def test_all_other_collectives(hosts):
    run_on_hosts(_others, hosts)


def _kind(rank: int, world_size: int) -> tuple[str, bool]:
    backend = backend_of()
    return type(backend).__name__, getattr(backend, "spans_hosts", False)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aa", ("ShmBackend", False)),
        ("ab", ("ProcessGroupGloo", False)),
        ("aba", ("ShmBackend", True)),
    ],
)
def test_shared_memory_is_for_ranks_that_share_a_host(hosts, expected):
    assert set(run_on_hosts(_kind, hosts)) == {expected}


def _subgroups(rank: int, world_size: int, backend: str) -> None:
    lists = {"within a": [0, 1], "across": [1, 2, 3], "pairs across": [0, 2], "all": [0, 1, 2, 3]}
    groups = {name: dist.new_group(ranks, backend=backend) for name, ranks in lists.items()}
    for _ in range(2):
        for name, ranks in lists.items():
            if rank in ranks:
                for numel in (5, 600_001):
                    tensor = given(rank, numel)
                    dist.all_reduce(tensor, group=groups[name])
                    assert torch.equal(tensor, reduced(ranks, numel)), name
    if backend == "shm":
        kinds = {
            name: type(backend_of(group)).__name__
            for name, group in groups.items()
            if rank in lists[name]
        }
        assert kinds.get("pairs across", "ProcessGroupGloo") == "ProcessGroupGloo"
        assert {kind for name, kind in kinds.items() if name != "pairs across"} <= {"ShmBackend"}
    for name, ranks in lists.items():
        if rank in ranks:
            dist.destroy_process_group(groups[name])
    again = dist.new_group([0, 1, 3], backend=backend)
    if rank != 2:
        tensor = given(rank, 5)
        dist.all_reduce(tensor, group=again)
        assert torch.equal(tensor, reduced([0, 1, 3], 5))


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_subgroups_within_and_across_hosts(backend):
    run_on_hosts(_subgroups, "aabb", backend, backend=backend)
