"""Interpreters that end without having destroyed their groups: status 0, no word, no hang."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp.comm import shm
from tests.ranks import Died, init_group, run_ranks

pytestmark = pytest.mark.usefixtures("needs_shm")

CPU = torch.device("cpu")
kept: list[Any] = []
"""Alive until the interpreter takes its modules apart."""


def nothing_kept() -> None:
    """Just ends."""


def pending_work() -> None:
    """Nobody else takes part in it."""
    if dist.get_rank() == 0:
        kept.append(dist.all_reduce(torch.ones(100_000), async_op=True))


def pending_work_nobody_holds() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(100_000), async_op=True)


def pending_work_with_callback() -> None:
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(100_000), async_op=True)
        work.get_future().add_done_callback(kept.append)


def work_just_done() -> None:
    for _ in range(20):
        kept.append(dist.all_reduce(torch.ones(1000), async_op=True))
    kept[-1].get_future().add_done_callback(lambda future: kept.append(future.value()))


def tensor_in_heap() -> None:
    backend = dist.group.WORLD._get_backend(CPU)
    tensor = backend.allocate_tensor(100_000, dtype=torch.float32, device=CPU)
    dist.all_reduce(tensor.fill_(1))
    kept.append(tensor)


def backend_alone() -> None:
    kept.append(dist.group.WORLD._get_backend(CPU))


def group_of_its_own() -> None:
    group = dist.new_group(backend="shm")
    dist.all_reduce(torch.ones(3), group=group)
    kept.append(group)


def tensor_of_destroyed_group() -> None:
    tensor_in_heap()
    dist.barrier()
    dist.destroy_process_group()


WAYS = [
    nothing_kept,
    pending_work,
    pending_work_nobody_holds,
    pending_work_with_callback,
    work_just_done,
    tensor_in_heap,
    backend_alone,
    group_of_its_own,
    tensor_of_destroyed_group,
]


def _end(rank: int, world_size: int, way: Callable[[], None]) -> None:
    init_group("shm", 30)
    tensor = torch.ones(100_000)
    dist.all_reduce(tensor)
    way()
    if dist.is_initialized() and way in (work_just_done, tensor_in_heap, group_of_its_own):
        dist.barrier()
    del tensor
    sys.stdout.flush()
    ctypes.pythonapi.Py_Exit(0)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_end_of_an_interpreter(way: Callable[[], None], capfd) -> None:
    began = time.monotonic()
    ended = run_ranks(_end, 2, way, init_group=False, expect_dead=[0, 1])
    assert ended == [Died(0)] * 2
    assert time.monotonic() - began < 15
    assert capfd.readouterr().out == ""


def _end_with_counterpart(rank: int, world_size: int, train: bool) -> None:
    model = fastddp.wrap(nn.Linear(300, 300))
    for _ in range(3):
        model(torch.ones(1, 300)).sum().backward()
    pair = shm.counterpart(dist.group.WORLD, CPU)
    assert pair is not dist.group.WORLD
    dist.barrier()
    kept.extend([model, pair])
    if train and rank == 0:  # its bucket waits for the other rank's for ever
        options = dist.AllreduceOptions()
        options.asyncOp = True
        kept.append(pair.allreduce([torch.ones(100_000)], options))
    sys.stdout.flush()
    ctypes.pythonapi.Py_Exit(0)


@pytest.mark.parametrize("train", [False, True], ids=["idle", "pending"])
def test_the_end_of_an_interpreter_that_trains_on_gloo(train: bool, capfd) -> None:
    ended = run_ranks(_end_with_counterpart, 2, train, expect_dead=[0, 1])
    assert ended == [Died(0)] * 2
    assert capfd.readouterr().out == ""


SCRIPT = """
import sys, torch, torch.distributed as dist, fastddp
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("shm", init_method=f"file://{store}", rank=rank, world_size=2)
backend = dist.group.WORLD._get_backend(torch.device("cpu"))
tensor = backend.allocate_tensor(100_000, dtype=torch.float32, device=torch.device("cpu"))
dist.all_reduce(tensor.fill_(1))
assert tensor[-1] == 2
work = dist.all_reduce(torch.ones(100_000), async_op=True)
if sys.argv[3] == "pending" and rank == 0:
    other = dist.all_reduce(torch.ones(100_000), async_op=True)
    other.get_future().add_done_callback(lambda future: print("told"))
if sys.argv[3] == "raise":
    work.wait()
    if rank == 1:
        raise KeyError("oh")
    try:
        dist.all_reduce(torch.ones(3))
    except RuntimeError as error:
        print(error)
"""


def run_scripts(folder: Path, how: str) -> tuple[list[int], list[str]]:
    """Returns the exit statuses and the outputs of two interpreters that are the ranks."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(folder / "store"), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        output = [rank.communicate(timeout=50)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"), [("idle", ""), ("pending", "told\n")], ids=["idle", "pending"]
)
def test_the_end_of_a_whole_script(how: str, said: str, tmp_path: Path) -> None:
    assert run_scripts(tmp_path, how) == ([0, 0], [said, ""])


@pytest.mark.slow
def test_how_a_script_ended_is_known_though_it_leaves_its_group_first(tmp_path: Path) -> None:
    statuses, (told, _) = run_scripts(tmp_path, "raise")
    assert statuses == [0, 1]
    assert re.search(
        r"collective 3 \(all_reduce of 3 float32, sum\) failed: rank 1 \(process \d+\) "
        r"(exited with status 1|has ended) before it took part",
        told,
    ), told
