"""What a run has left behind tells which rank was late, and which one died where."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp.timeline.clock import Shift
from fastddp.timeline.report import Report
from fastddp.timeline.run import read_run
from fastddp.watch import events
from fastddp.watch.events import Kind
from fastddp.watch.ring import Header
from fastddp.watch.ring_reader import parse
from tests.ranks import Died, run_ranks
from tests.slow import slow_but_for

LATE_S = 0.04
STEPS = 12
TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}


def _train(rank: int, world_size: int, engine: str, late: int, victim: int) -> str:
    model = fastddp.wrap(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)), engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number in range(STEPS + 1):
        if rank == late:
            time.sleep(LATE_S)
        optimizer.zero_grad()
        loss = model(torch.ones(4, 64)).sum()
        if rank == victim and number == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            loss.backward()
        except dist.DistBackendError:
            break
        optimizer.step()
    return str(fastddp.report())


def _train_on_two_hosts(rank: int, world_size: int, late: int) -> None:
    os.environ["FASTDDP_HOST_ID"] = f"host {rank}"
    _train(rank, world_size, "python", late, -1)


@pytest.mark.parametrize("late", slow_but_for([1], [0, 1]))
def test_hosts_are_put_on_one_clock(late: int, tmp_path: Path) -> None:
    # Both hosts are this machine, so the shift between their clocks is zero, whatever their dates
    # are.
    env = {"FASTDDP_TRACE": str(tmp_path)}
    run_ranks(_train_on_two_hosts, 2, late, env=env, timeout=60)
    (path,) = tmp_path.glob("rank-1.*.ring")
    memory = bytearray(path.read_bytes())
    (date,) = struct.unpack_from("<Q", memory, 8 * Header.MADE_EPOCH_NS)
    struct.pack_into("<Q", memory, 8 * Header.MADE_EPOCH_NS, date + 60 * 10**9)
    path.write_bytes(memory)
    run = read_run(tmp_path)
    first, second = (host.shift for host in run.hosts)
    assert first == Shift(0, 0)
    assert second.error_ns is not None
    assert abs(second.ns) <= second.error_ns < 2e9 * LATE_S
    worst = Report.of(run).models[0].lasts[0]
    assert worst.rank == late


@pytest.mark.parametrize("transport", slow_but_for(["shm"], TRANSPORTS))
def test_a_late_rank_and_a_killed_one_are_named(
    engine: str, transport: str, tmp_path: Path
) -> None:
    env = {**TRANSPORTS[transport], "FASTDDP_TRACE": str(tmp_path)}
    own, died = run_ranks(_train, 2, engine, 1, 1, env=env, timeout=60, expect_dead=[1])
    assert isinstance(died, Died)
    run = read_run(tmp_path)
    assert (list(run.rings), len(run.hosts)) == ([0, 1], 1)
    (model,) = Report.of(run).models
    assert (model.first, model.last) == (0, STEPS - 1)
    worst = model.lasts[0]
    assert worst.rank == 1
    assert worst.share > 0.5
    assert worst.by > 500 * LATE_S
    assert worst.before_forward is not None
    assert worst.before_forward > worst.by / 2
    assert "waiting for late ranks" in {part.value for part in model.ranks[0].parts}

    command = [sys.executable, "-m", "fastddp", "report", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = " ".join(printed.split())
    assert "Rank 1 was last in" in text
    assert "of that before its forward began." in text
    assert "Rank 0: a wait ended with an error" in text
    assert f"between a forward and its backward, after step {STEPS - 1}." in text
    assert {"trace.json", "report.html"} <= {path.name for path in tmp_path.iterdir()}

    assert own.startswith("fastddp report: rank 0 of 2, steps 0 to 11")
    assert ("Rank 1 was last in" in own) == (transport == "shm")


def _stall(rank: int, world_size: int) -> None:
    model = fastddp.wrap(nn.Linear(4, 1))
    for number in range(3):
        if rank == 1 and number == 1:
            time.sleep(3.5)
        model(torch.ones(1, 4)).sum().backward()
    deadline = time.monotonic() + 30
    while rank == 0 and not _has_recorded(Kind.STALL_END) and time.monotonic() < deadline:
        time.sleep(0.1)


def _has_recorded(kind: Kind) -> bool:
    return any(event.kind is kind for event in parse(events.snapshot()).events())


def test_a_stall_is_told(tmp_path: Path) -> None:
    env = {"FASTDDP_TRACE": str(tmp_path), "FASTDDP_STALL_SECONDS": "1"}
    run_ranks(_stall, 2, env=env, timeout=60)
    run = read_run(tmp_path)
    (stall,) = run.recordings[0].stalls
    assert stall.rank == 1
    assert stall.end is not None
    assert 2.5e9 < stall.end - stall.begin < 30e9
    assert "Rank 1 was waited for once as a stall" in str(Report.of(run))
