"""What a rank finds under `fastddp.spawn`, and what comes back from it."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.spawn.common import alone


def _train(rank: int, factor: float) -> dict[str, Any]:
    model = fastddp.wrap(Ladder())
    world_size = dist.get_world_size()
    for step in range(3):
        model.zero_grad()
        model(factor * ladder_x(rank, step, world_size)).backward()
        assert_ladder(model.module, factor * mean_x(step, world_size), step)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {
        "variables": [int(os.environ[name]) for name in names],
        "group": (dist.get_rank(), dist.get_world_size()),
        "threads": (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]),
        "weight": model.a.detach(),
    }


def test_training_and_its_values_by_rank():
    """Under wrap, with the default number of ranks."""
    values = fastddp.spawn(_train, args=(2.0,))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [value["variables"] for value in values] == [[0, 0, 2, 2], [1, 1, 2, 2]]
    assert [value["group"] for value in values] == [(0, 2), (1, 2)]
    assert [value["threads"] for value in values] == [(threads, str(threads))] * 2
    assert torch.equal(values[0]["weight"], Ladder().a)


def _odd_values(rank: int, shared: torch.Tensor, folder: str) -> Any:
    shared[rank] = rank + 1  # shared memory, as with torch's spawn
    if rank == 0:
        dist.destroy_process_group()  # a script that does its own clean-up
        return threading.Lock()
    dist.destroy_process_group()
    Path(folder, "variables").write_text(os.environ["OMP_NUM_THREADS"])
    sys.exit(0)


def test_what_cannot_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shared = torch.zeros(2)
    with pytest.warns(RuntimeWarning, match="rank 0 of 2 returned cannot be pickled.*None is in"):
        values = fastddp.spawn(_odd_values, nprocs=2, args=(shared, str(tmp_path)))
    assert values == [None, None]
    assert shared.tolist() == [1.0, 2.0]
    assert (tmp_path / "variables").read_text() == "3"
    monkeypatch.undo()  # before the fixture looks


def test_one_rank():
    assert fastddp.spawn(alone, 1) == [(0, 1)]


def test_the_store_listens_on_loopback_alone(fast_start):
    assert fastddp.spawn(_listeners, 2) == [["0100007F"]] * 2  # 127.0.0.1


def _listeners(rank: int) -> list[str]:
    """The addresses at which somebody listens on the store's port: nobody else can be there."""
    port = int(os.environ["MASTER_PORT"])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, number = line.split()[1].split(":")
            if int(number, 16) == port and line.split()[3] == "0A":  # TCP_LISTEN
                found.append(address)
    return found
