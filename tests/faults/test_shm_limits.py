"""What runs out: descriptors, and room in the heap. Errors say which, and what to do."""

from __future__ import annotations

import os
import resource

import pytest
import torch
import torch.distributed as dist

import fastddp  # noqa: F401  # registers the backend
from tests.faults.holdings import descriptors
from tests.ranks import init_group, run_ranks

pytestmark = pytest.mark.usefixtures("needs_shm")

CPU = torch.device("cpu")


def _out_of_descriptors(rank: int, world_size: int) -> None:
    init_group("shm", 20)
    dist.new_group(backend="shm")
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2))
    said = rf"as many files open as it may, {used + 2} .RLIMIT_NOFILE.*ulimit -n.*fewer process gr"
    with pytest.raises(RuntimeError, match=said):
        dist.new_group(backend="shm")


def test_too_many_open_files_are_an_error_that_names_the_limit():
    run_ranks(_out_of_descriptors, 2, init_group=False)


def _many_groups(rank: int, world_size: int) -> None:
    init_group("shm", 20)

    def count() -> int:
        return sum("pidfd" in link for link in descriptors().values())

    before = count()
    groups = [dist.new_group(backend="shm") for _ in range(4)]
    assert before == world_size
    assert count() == before
    for group in groups:
        dist.all_reduce(torch.ones(9), group=group)


def test_a_process_is_opened_once_for_all_groups():
    run_ranks(_many_groups, 2, init_group=False)


def _no_room(rank: int, world_size: int) -> None:
    init_group("shm", 20)
    backend = dist.group.WORLD._get_backend(CPU)
    for numel in (1 << 50, 1 << 61, (1 << 63) - 1):  # the product overflows, too
        with pytest.raises(torch.OutOfMemoryError, match=rf"rank {rank}: .*room for \d+"):
            backend.allocate_tensor(numel, dtype=torch.float64, device=CPU)
    with pytest.raises(ValueError, match="a tensor of -1 elements"):
        backend.allocate_tensor(-1, dtype=torch.float64, device=CPU)
    assert backend.allocate_tensor(7, dtype=torch.float64, device=CPU).numel() == 7


def test_a_heap_without_room_is_an_error_of_its_own():
    run_ranks(_no_room, 2, init_group=False)


def _blocks_after_a_fault(rank: int, world_size: int) -> None:
    init_group("shm", 20)
    broken, whole = dist.new_group(backend="shm"), dist.new_group(backend="shm")

    def allocate() -> torch.Tensor:
        backend = whole._get_backend(CPU)
        return backend.allocate_tensor(50_000, dtype=torch.float32, device=CPU)

    in_it, beside = allocate(), allocate()
    places = in_it.data_ptr(), beside.data_ptr()
    with pytest.raises(RuntimeError, match="do not agree"):
        dist.all_reduce(in_it[: 50_000 - rank], group=broken)
    del in_it, beside
    # The second block is as good as ever, and stays so; a peer may still write to the first.
    for _ in range(3):
        assert allocate().data_ptr() == places[1]
    x = allocate().fill_(rank + 1)
    dist.all_reduce(x, group=whole)
    assert bool((x == 3).all())


def test_after_a_fault_only_the_memory_that_was_in_it_is_given_up():
    run_ranks(_blocks_after_a_fault, 2, init_group=False)
