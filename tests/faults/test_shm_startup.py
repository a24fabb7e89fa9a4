"""Memory that cannot be shared: all ranks use gloo, and rank 0 says why, once."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp import extension
from fastddp.comm import shm
from tests.faults import mounts
from tests.ranks import init_group, run_ranks

pytestmark = pytest.mark.usefixtures("needs_shm")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Started:
    backend: str
    warnings: list[str]


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def start(way: str, trouble: Callable[[], None] | None) -> Started:
    """Makes a group; `trouble` comes before this rank looks for the others' memory."""
    warnings = Warnings()
    logging.getLogger("fastddp").addHandler(warnings)
    if way == "shm":
        if trouble is not None:
            trouble()
        init_group("shm", 20)
        backend = dist.group.WORLD._get_backend(CPU)
    else:
        init_group("gloo", 20)
        extension.load()  # it, and more Python, take descriptors: another concern
        import_module("fastddp.engine.native")
        if trouble is not None:
            trouble()
        model = fastddp.wrap(nn.Linear(3, 3))
        model(torch.ones(1, 3)).sum().backward()
        backend = shm.counterpart(dist.group.WORLD, CPU)._get_backend(CPU)
    for numel in (3, 100_000):
        tensor = torch.ones(numel)
        dist.all_reduce(tensor)
        assert tensor[-1] == dist.get_world_size()
    return Started(backend.name(), warnings.texts)


def _raise(*_: object) -> NoReturn:
    raise RuntimeError("no luck today")


def no_heap() -> None:
    extension.load().shm_heap = _raise


def no_control() -> None:
    extension.load().shm_control = _raise


def no_mapping() -> None:
    extension.load().ShmBackend = _raise


def no_extension() -> None:
    extension._find = lambda: (None, "no luck today, \0\u00e9\U0001f600" * 1000)


def not_wanted() -> None:
    os.environ["FASTDDP_SHM"] = "0"


def no_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (200 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def no_descriptors() -> None:
    limit = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = [os.dup(1)]  # so that none below the limit is free
    while held[-1] < limit:
        held.append(os.dup(1))
    os.close(held.pop())
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def no_proc() -> None:
    mounts.hide("/proc")


TROUBLE = {
    no_heap: "no luck today",
    no_mapping: "no luck today",
    no_extension: "no luck today, \0\u00e9\U0001f600no luck",
    not_wanted: "FASTDDP_SHM=0",
    no_address_space: "shared memory",
    no_descriptors: "Too many open files",
    no_proc: "/proc/",
}


def _start_with_trouble_on(
    rank: int, world_size: int, way: str, victim: int, trouble: Callable[[], None]
) -> Started:
    return start(way, trouble if rank == victim else None)


def _may_mount(rank: int, world_size: int) -> bool:
    try:
        mounts.hide("/dev/shm")
    except mounts.NotPermitted:
        return False
    return True


def need_mounts() -> None:
    if not all(run_ranks(_may_mount, 1, init_group=False)):
        pytest.skip("this process may not mount anything")


def check_all_on_gloo(started: list[Started], victim: int, why: str) -> None:
    assert [each.backend for each in started] == ["gloo"] * 3
    assert [len(each.warnings) for each in started] == [1, 0, 0], started
    (warning,) = started[0].warnings
    assert warning.startswith(
        f"the ranks' memory is not shared, all goes through gloo: rank {victim}: "
    )
    assert why in warning, warning


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda trouble: trouble.__name__)
def test_trouble_on_one_rank_puts_all_on_gloo(trouble: Callable[[], None], victim: int) -> None:
    if trouble is no_proc:
        need_mounts()  # asked first, because a rank that stops when its peers wait fails them
    # A process without descriptors cannot even connect to the others.
    way = "wrap" if trouble is no_descriptors or victim == 2 else "shm"
    started = run_ranks(_start_with_trouble_on, 3, way, victim, trouble, init_group=False)
    check_all_on_gloo(started, victim, TROUBLE[trouble])


@pytest.mark.parametrize("way", ["shm", "wrap"])
def test_no_segment_for_the_group(way: str) -> None:
    started = run_ranks(_start_with_trouble_on, 3, way, 0, no_control, init_group=False)
    check_all_on_gloo(started, 0, "no luck today")


def _start_as_told(rank: int, world_size: int, way: str, own_host: bool) -> Started:
    if own_host:
        os.environ["FASTDDP_HOST_ID"] = f"host {rank} " + "x" * 5000
    return start(way, None)


@pytest.mark.parametrize("way", ["shm", "wrap"])
def test_ranks_on_hosts_of_their_own_use_gloo_without_a_word(way: str) -> None:
    started = run_ranks(_start_as_told, 2, way, True, init_group=False)
    assert started == [Started("gloo", [])] * 2


@pytest.mark.parametrize("way", ["shm", "wrap"])
def test_FASTDDP_SHM_0_is_obeyed_without_a_word(way: str) -> None:
    started = run_ranks(_start_as_told, 2, way, False, init_group=False, env={"FASTDDP_SHM": "0"})
    assert started == [Started("gloo", [])] * 2


# ---- containers --------------------------------------------------------------------------


def _start_in_container(rank: int, world_size: int, read_only: bool) -> Started:
    mounts.hide("/dev/shm", "64k", read_only)
    started = start("shm", None)
    backend = dist.group.WORLD._get_backend(CPU)
    numel = (100 << 20) // 4
    heap = backend.allocate_tensor(numel, dtype=torch.float32, device=CPU)
    for tensor in (heap.fill_(1), torch.ones(numel)):
        dist.all_reduce(tensor)
        assert bool((tensor == world_size).all())
    return started


@pytest.mark.parametrize("read_only", [False, True], ids=["tiny", "read_only"])
def test_dev_shm_is_not_needed(read_only: bool) -> None:
    need_mounts()
    started = run_ranks(_start_in_container, 2, read_only, init_group=False)
    assert started == [Started("shm", [])] * 2
