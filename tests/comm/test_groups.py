"""Several groups: at the same time, nested, from several threads, made and destroyed."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import (
    allocate,
    case,
    expect,
    given,
    kinds_of_memory,
    not_gloo,
    operand,
    reduced,
    run_group,
)
from tests.ranks import init_group, run_ranks, scratch_folder

DEADLINE_S = 20.0
SIZES = (1, 1000, 70_000, 400_000)


def _in_threads(*functions: Callable[[], None]) -> None:
    """Run each in a thread of its own; raise what the first of them raised."""
    errors: list[BaseException] = []

    def run(fn: Callable[[], None]) -> None:
        try:
            fn()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(fn,)) for fn in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def _sub_groups(rank: int, world_size: int, backend: str) -> None:
    members = {
        "lower half": [0, 1],
        "upper half": [2, 3],
        "middle": [1, 2],
        "ends": [0, 3],
        "three": [0, 2, 3],
        "all": [0, 1, 2, 3],
        "one": [2],
    }
    groups = {name: dist.new_group(ranks) for name, ranks in members.items()}
    mine = [name for name, ranks in members.items() if rank in ranks]
    for kind in kinds_of_memory(backend):
        for numel in SIZES:
            with case(f"one group after the other, {numel}, {kind}"):
                for name in mine:
                    x = operand(kind, given(rank, numel))
                    dist.all_reduce(x.tensor, group=groups[name])
                    expect(x.tensor, reduced(members[name], numel))
            with case(f"all groups at the same time, {numel}, {kind}"):
                operands = {name: operand(kind, given(rank, numel)) for name in mine}
                works = [
                    dist.all_reduce(x.tensor, group=groups[name], async_op=True)
                    for name, x in operands.items()
                ]
                for work in works:
                    work.wait()
                for name, x in operands.items():
                    expect(x.tensor, reduced(members[name], numel))
                    x.check_guards()
    for name in mine:
        with case(f"ranks and roots in {name}"):
            group, ranks = groups[name], members[name]
            assert dist.get_group_rank(group, rank) == ranks.index(rank)
            for index, root in enumerate(ranks):
                x = given(rank, 9)
                dist.broadcast(x, root, group=group)
                expect(x, given(root, 9))
                x = given(rank, 9)
                dist.broadcast(x, group_src=index, group=group)
                expect(x, given(root, 9))
                x = given(rank, 9)
                dist.reduce(x, root, group=group)
                if rank == root:
                    expect(x, reduced(ranks, 9))
            out = torch.empty(9 * len(ranks))
            dist.all_gather_into_tensor(out, given(rank, 9), group=group)
            expect(out, torch.cat([given(r, 9) for r in ranks]))
            out = torch.empty(9)
            dist.reduce_scatter_tensor(out, given(rank, 9 * len(ranks)), group=group)
            expect(out, reduced(ranks, 9, start=9 * ranks.index(rank)))


def test_sub_groups(backend):
    run_group(_sub_groups, 4, backend, backend)


def _two_threads(rank: int, world_size: int, backend: str) -> None:
    groups = [dist.new_group(), dist.new_group()]

    def work(group: dist.ProcessGroup, start: int) -> None:
        for i in range(100):
            for kind in kinds_of_memory(backend):
                numel = SIZES[i % 3]
                x = operand(kind, given(rank, numel, start=start + i))
                dist.all_reduce(x.tensor, group=group)
                expect(x.tensor, reduced(world_size, numel, start=start + i))

    _in_threads(lambda: work(groups[0], 0), lambda: work(groups[1], 1000))


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_groups_in_two_threads(backend, world_size):
    run_group(_two_threads, world_size, backend, backend)


def _opposite_order(rank: int, world_size: int) -> None:
    groups = [dist.new_group(), dist.new_group()]
    for i in range(20):
        for numel in SIZES:
            tensors = [given(rank, numel, start=i), given(rank, numel, start=1000 + i)]
            order = (0, 1) if rank % 2 == 0 else (1, 0)
            works = [dist.all_reduce(tensors[g], group=groups[g], async_op=True) for g in order]
            for work in works:
                work.wait()
            expect(tensors[0], reduced(world_size, numel, start=i))
            expect(tensors[1], reduced(world_size, numel, start=1000 + i))


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_groups_in_opposite_order(backend, world_size):
    run_group(_opposite_order, world_size, backend)


def _many_groups_in_flight(rank: int, world_size: int) -> None:
    """More groups than any pool of threads has, each begun on one rank before on the other."""
    groups = [dist.new_group() for _ in range(12)]
    tensors = [given(rank, 70_000, start=i) for i in range(12)]
    order = range(12) if rank == 0 else range(11, -1, -1)
    works = [dist.all_reduce(tensors[i], group=groups[i], async_op=True) for i in order]
    for work in works:
        work.wait()
    for i, x in enumerate(tensors):
        expect(x, reduced(world_size, 70_000, start=i))


def test_many_groups_in_opposite_order(backend):
    run_group(_many_groups_in_flight, 2, backend)


def _blocked_group_blocks_no_other(rank: int, world_size: int) -> None:
    """Rank 0 waits in one group for a collective that rank 1 begins only after another group's."""
    first, second = dist.new_group(), dist.new_group()
    x, y = given(rank, 5000), given(rank, 5000, start=1)
    if rank == 0:
        _in_threads(
            lambda: dist.all_reduce(x, group=first), lambda: dist.all_reduce(y, group=second)
        )
    else:
        dist.all_reduce(y, group=second)
        dist.all_reduce(x, group=first)
    expect(x, reduced(world_size, 5000))
    expect(y, reduced(world_size, 5000, start=1))


def test_a_group_that_waits_blocks_no_other(backend):
    run_group(_blocked_group_blocks_no_other, 2, backend)


def _open_files() -> list[str]:
    """Name what this process has open and mapped that is not an ordinary file."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    with open("/proc/self/maps") as maps:
        names += [
            line.split(maxsplit=5)[-1] for line in maps if "memfd:" in line or "/shm/" in line
        ]
    return [name.split(":")[0] for name in names]


def _made_and_destroyed(rank: int, world_size: int, backend: str) -> None:
    counts = []
    for i in range(40):
        group = dist.new_group(backend=backend)
        x = given(rank, SIZES[i % len(SIZES)])
        dist.all_reduce(x, group=group)
        expect(x, reduced(world_size, len(x)))
        dist.destroy_process_group(group)
        del group
        gc.collect()
        counts.append((len(_open_files()), len(os.listdir("/proc/self/task"))))
    # What is kept for the process's life is there after the first few.
    files, threads = zip(*counts, strict=True)
    assert max(files[20:]) <= max(files[5:20]), (files, sorted(_open_files()))
    assert max(threads[20:]) <= max(threads[5:20]), threads


def test_groups_made_and_destroyed_leave_nothing(backend):
    run_group(_made_and_destroyed, 2, backend, backend)


def _default_group_again(rank: int, world_size: int, backend: str) -> None:
    for i in range(6):
        dist.init_process_group(
            backend,
            init_method=f"file://{scratch_folder()}/again-{i}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=DEADLINE_S),
        )
        x = given(rank, 5000, start=i)
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        expect(x, reduced(world_size, 5000, start=i))
        sub = dist.new_group([0, 1])
        if rank < 2:
            x = given(rank, 5000, start=i)
            dist.all_reduce(x, group=sub)
            expect(x, reduced(2, 5000, start=i))
        dist.barrier()
        dist.destroy_process_group()
    # What outlives its group must do no harm when it goes.
    assert work.is_completed()
    work.wait()


def test_the_default_group_again_and_again(backend):
    run_ranks(_default_group_again, 3, backend, init_group=False)


def _destroyed_with_work(rank: int, world_size: int) -> None:
    for numel in SIZES:
        with case(f"{numel}"):
            group = dist.new_group()
            x = given(rank, numel)
            work = dist.all_reduce(x, group=group, async_op=True)
            dist.destroy_process_group(group)
            del group
            # Begun by all: it ends, as if the group were still there.
            work.wait()
            expect(x, reduced(world_size, numel))
            dist.barrier()
    x = given(rank, 70_000)
    dist.all_reduce(x, async_op=True)  # nobody waits; the default group is destroyed at the end


@pytest.mark.parametrize("world_size", [2, 4])
def test_destroyed_while_works_are_under_way(backend, world_size):
    run_group(_destroyed_with_work, world_size, backend)


def _only_members_call(rank: int, world_size: int) -> None:
    """A group made by its members alone, and one within it."""
    if rank == 0:
        return
    outer = dist.new_group([1, 2, 3], use_local_synchronization=True)
    x = given(rank, 1000)
    dist.all_reduce(x, group=outer)
    expect(x, reduced([1, 2, 3], 1000))
    if rank in (1, 3):
        inner = dist.new_group([1, 3], use_local_synchronization=True)
        x = given(rank, 1000)
        dist.all_reduce(x, group=inner)
        expect(x, reduced([1, 3], 1000))
    dist.barrier(group=outer)


def test_groups_made_by_their_members_alone(backend):
    run_group(_only_members_call, 4, backend)


def _beside_gloo(rank: int, world_size: int, backend: str) -> None:
    init_group("gloo")
    group = dist.new_group(backend=backend)
    for numel in SIZES:
        x, y = given(rank, numel), given(rank, numel, start=1)
        work = dist.all_reduce(x, async_op=True)
        dist.all_reduce(y, group=group)
        work.wait()
        expect(x, reduced(world_size, numel))
        expect(y, reduced(world_size, numel, start=1))


def test_beside_a_default_group_of_gloo(backend):
    run_ranks(_beside_gloo, 2, backend, init_group=False)


def _by_device(rank: int, world_size: int, backend: str) -> None:
    init_group(f"cpu:{backend}")
    assert dist.get_backend_config() == f"cpu:{backend}"
    x = given(rank, 1000)
    dist.all_reduce(x)
    expect(x, reduced(world_size, 1000))


def test_named_by_device(backend):
    run_ranks(_by_device, 2, backend, init_group=False)


def _mesh(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    row, column = rank // 2, rank % 2
    for _ in range(3):
        x = given(rank, 1000)
        dist.all_reduce(x, group=mesh.get_group("columns"))
        expect(x, reduced([2 * row, 2 * row + 1], 1000))
        x = given(rank, 1000)
        dist.all_reduce(x, group=mesh.get_group("rows"))
        expect(x, reduced([column, column + 2], 1000))


def test_device_mesh(backend):
    run_group(_mesh, 4, backend)


def _lonely(rank: int, world_size: int) -> None:
    """A group of one, and what those outside get from it."""
    group = dist.new_group([1])
    x = given(rank, 1000)
    if rank == 1:
        dist.all_reduce(x, group=group)
        dist.broadcast(x, 1, group=group)
        dist.barrier(group=group)
    else:
        assert group == dist.GroupMember.NON_GROUP_MEMBER
    expect(x, given(rank, 1000))


def test_a_group_of_one(backend):
    run_group(_lonely, 2, backend)


def _rebuilt_after_abort(rank: int, world_size: int) -> None:
    """An aborted group raises instead of waiting; the next group works."""
    group = dist.new_group(timeout=timedelta(seconds=DEADLINE_S))
    x = given(rank, 1000)
    dist.all_reduce(x, group=group)
    group.abort()
    with pytest.raises(RuntimeError):
        dist.all_reduce(x, group=group)
    dist.barrier()
    again = dist.new_group()
    x = given(rank, 1000)
    dist.all_reduce(x, group=again)
    expect(x, reduced(world_size, 1000))


def _abort_wakes(rank: int, world_size: int) -> None:
    """A rank that waits in a collective is woken by an abort from another of its threads."""
    group = dist.new_group(timeout=timedelta(seconds=DEADLINE_S))
    if rank == 0:
        work = dist.all_reduce(given(rank, 1000), group=group, async_op=True)
        timer = threading.Timer(0.2, group.abort)
        timer.start()
        with pytest.raises(RuntimeError, match="abort"):
            work.wait()
        timer.join()
    dist.barrier()


@not_gloo  # whose abort() does nothing
@pytest.mark.parametrize("body", [_rebuilt_after_abort, _abort_wakes])
def test_abort(backend, body):
    run_group(body, 2, backend)


def _outlived(rank: int, world_size: int) -> None:
    """Memory of the backend's own is memory: it stays when the group goes."""
    group = dist.new_group()
    tensors = [allocate(n, torch.float32, group) for n in SIZES]
    for x in tensors:
        assert bool((x == 0).all()), "memory is given out zeroed"
        x.copy_(given(rank, len(x)))
        dist.all_reduce(x, group=group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    for x in tensors:
        expect(x, reduced(world_size, len(x)))
        x += 1
    # It is as good in any other group.
    for x in tensors:
        x.copy_(given(rank, len(x)))
        dist.all_reduce(x)
        expect(x, reduced(world_size, len(x)))
    parameter = torch.nn.Parameter(tensors[1])
    (parameter * 2).sum().backward()
    expect(parameter.grad, torch.full_like(tensors[1], 2.0))


@not_gloo  # which has no memory of its own
def test_allocated_memory_outlives_its_group(backend):
    run_group(_outlived, 2, backend)


def _allocated_and_freed(rank: int, world_size: int) -> None:
    """Freed memory is given out again, on each rank in another order."""
    choose = random.Random(rank)
    kept: list[torch.Tensor] = []
    for i in range(200):
        numel = SIZES[i % len(SIZES)]
        x = allocate(numel, torch.float32)
        assert x.numel() == numel
        x.copy_(given(rank, numel, start=i))
        dist.all_reduce(x)
        expect(x, reduced(world_size, numel, start=i))
        kept.append(x)
        del x
        while len(kept) > choose.randrange(1, 20):
            kept.pop(choose.randrange(len(kept)))


@not_gloo
def test_allocated_and_freed_in_any_order(backend):
    run_group(_allocated_and_freed, 3, backend)
