"""Processes forked from a rank: they cannot use its groups, and nothing they do disturbs it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastddp
from tests.faults.holdings import Holdings, destroy
from tests.ranks import Died, init_group, run_ranks, scratch_folder

pytestmark = [
    pytest.mark.usefixtures("needs_shm"),
    # torch and Python warn of forks in a process with threads, which every rank is.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

CPU = torch.device("cpu")


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((8,), float(index))


def _train_with_workers(rank: int, world_size: int) -> list[float]:
    model = fastddp.wrap(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        for batch in DataLoader(
            Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork"
        ):
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
    return next(model.parameters()).flatten().tolist()


def test_training_with_forked_workers_of_a_data_loader() -> None:
    one, other = run_ranks(_train_with_workers, 2)
    assert one == other


def in_child(body: Callable[[], None], *, exits: bool) -> int:
    """Returns the wait status of a child that runs `body`.

    Args:
        exits: whether it ends as an interpreter does, with destructors; else at once.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        if exits and status == 0:
            sys.stdout.flush()
            ctypes.pythonapi.Py_Exit(0)
        os._exit(status)
    return os.waitpid(child, 0)[1]


def check_all_reduce(world_size: int) -> None:
    for numel in (3, 100_000):
        tensor = torch.ones(numel)
        dist.all_reduce(tensor)
        dist.all_reduce(tensor, async_op=True).wait()
        assert tensor[-1] == world_size**2


def use_group_in_child() -> None:
    for async_op in (False, True):
        for collective in (
            lambda **options: dist.all_reduce(torch.ones(3), **options),
            lambda **options: dist.broadcast(torch.ones(100_000), 0, **options),
            lambda **options: dist.reduce(torch.ones(3), 0, **options),
            lambda **options: dist.barrier(**options),
        ):
            with pytest.raises(RuntimeError, match="was forked from the one that made the process"):
                collective(async_op=async_op)


def drop_group_in_child() -> None:
    dist.distributed_c10d._world.pg_map.clear()
    dist.distributed_c10d.GroupMember.WORLD = None
    gc.collect()


def destroy_in_child() -> None:
    dist.destroy_process_group()
    gc.collect()


def abort_in_child() -> None:
    with pytest.raises(RuntimeError, match="was forked from the one that made the process"):
        dist.group.WORLD._get_backend(CPU).abort()


def do_nothing() -> None:
    """Just ends."""


def _fork(rank: int, world_size: int, body: Callable[[], None], exits: bool) -> None:
    before = Holdings.now()
    init_group("shm", 20)
    check_all_reduce(world_size)
    heap = dist.group.WORLD._get_backend(CPU).allocate_tensor(
        100_000, dtype=torch.float32, device=CPU
    )
    heap.fill_(1)
    if rank == 0:
        held = [heap]
        del heap

        def with_tensor() -> None:
            held.clear()  # frees the child's, not the parent's
            body()

        keep = held[0]
        assert in_child(with_tensor, exits=exits) == 0
        heap = keep
        del keep
        held.clear()
    check_all_reduce(world_size)
    assert bool((heap == 1).all())
    dist.all_reduce(heap)
    assert bool((heap == world_size).all())
    dist.barrier()
    del heap
    destroy()
    before.check_same_but_for_my_heap()


@pytest.mark.parametrize("exits", [False, True], ids=["at_once", "with_destructors"])
@pytest.mark.parametrize(
    "body",
    [use_group_in_child, drop_group_in_child, destroy_in_child, abort_in_child, do_nothing],
    ids=lambda body: body.__name__,
)
def test_a_child_neither_uses_nor_disturbs_its_parents_group(
    body: Callable[[], None], exits: bool
) -> None:
    run_ranks(_fork, 2, body, exits, init_group=False)


def _own_group_in_child(rank: int, world_size: int) -> None:
    init_group("shm", 20)
    check_all_reduce(world_size)

    def body() -> None:
        dist.distributed_c10d.destroy_process_group()
        dist.init_process_group(
            "shm",
            init_method=f"file://{scratch_folder()}/children",
            rank=rank,
            world_size=world_size,
        )
        check_all_reduce(world_size)
        heap = dist.group.WORLD._get_backend(CPU).allocate_tensor(
            100_000, dtype=torch.float32, device=CPU
        )
        dist.all_reduce(heap.fill_(1))
        assert bool((heap == world_size).all())

    assert in_child(body, exits=False) == 0
    check_all_reduce(world_size)


def test_children_can_make_a_group_of_their_own() -> None:
    run_ranks(_own_group_in_child, 2, init_group=False)


def _outlived_by_child(rank: int, world_size: int) -> None:
    """Rank 1 is killed while a child of it lives on, with all that it inherited."""
    before = Holdings.now()
    init_group("shm", 20)
    check_all_reduce(world_size)
    if rank == 1:
        child = os.fork()
        if child == 0:
            while not (scratch_folder() / "told").exists():
                time.sleep(0.01)
            os._exit(0)
        (scratch_folder() / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 \(process \d+\) (was killed by|has ended)"):
        check_all_reduce(world_size)
    assert time.monotonic() - began < 15  # the group waits 20 s
    destroy()
    before.check_same_but_for_my_heap()
    child = int((scratch_folder() / "child").read_text())
    os.kill(child, 0)  # it lives
    (scratch_folder() / "told").touch()


def test_a_child_that_lives_on_does_not_hide_that_its_parent_died() -> None:
    assert run_ranks(_outlived_by_child, 2, init_group=False, expect_dead=[1])[1] == Died(-9)
