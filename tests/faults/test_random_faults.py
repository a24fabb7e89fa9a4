"""A rank that dies or stops anywhere in a training loop: the others get an error that says where.

Where is the number of an event: a rank counts the layers of its forwards, the gradients of its
backwards and its statements in between, and sends itself a signal at one of them.

FASTDDP_FAULT_SEEDS=200 tries that many faults, instead of a few.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastddp
from tests.faults.holdings import shared_files_of
from tests.ranks import Died, run_ranks, scratch_folder
from tests.slow import slow_but_for

GROUP_TIMEOUT_S = 5.0
STEPS = 4
"""The last is for the others: it is where they miss a rank that went at the end of the third."""
SEEDS = int(os.environ.get("FASTDDP_FAULT_SEEDS", "6"))


@dataclass(frozen=True)
class Fault:
    world_size: int
    victim: int
    with_signal: int
    event: int
    buffers: bool
    """Whether the model has buffers, which are broadcast before every forward."""


@dataclass(frozen=True)
class Survived:
    """What a rank that went on saw."""

    message: str
    waited_s: float
    """From the last thing that it did to the error."""
    pids: list[int]
    """Of all ranks."""


def fault_of(seed: int) -> Fault:
    rng = random.Random(seed)
    world_size = rng.choice([2, 3])
    # A stopped rank costs a whole timeout, so it is the rarer.
    return Fault(
        world_size=world_size,
        victim=rng.randrange(world_size),
        with_signal=int(signal.SIGSTOP) if seed % 4 == 3 else int(signal.SIGKILL),
        event=rng.randrange(1, num_events(STEPS - 1)),
        buffers=rng.random() < 0.5,
    )


def num_events(steps: int) -> int:
    """Counts the events of so many steps, on a model that is not wrapped."""
    events = Events(at=0)
    train(make_model(False), events, steps)
    return events.count


class Events:
    """Counts, and sends this process a signal when number `at` is reached; 0 is never reached."""

    def __init__(self, at: int, with_signal: int = 0) -> None:
        self.count = 0
        self._at = at
        self._signal = with_signal
        self.last_at = time.monotonic()

    def tick(self, *_: object) -> None:
        self.count += 1
        self.last_at = time.monotonic()
        if self.count == self._at:
            os.kill(os.getpid(), self._signal)


class Watched(nn.Module):
    """Layers that tell of every step into and back through them."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.events: Events | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.events is not None
        for layer in self.layers:
            x = layer(x)
            self.events.tick()
            x.register_hook(self.events.tick)
        return x


def make_model(buffers: bool) -> Watched:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(8) if buffers else nn.Identity()
    return Watched(nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), nn.Linear(8, 1)))


def train(model: nn.Module, events: Events, steps: int = STEPS) -> None:
    """The last layers' buckets are launched while backward goes on to the first one's."""
    wrapped = isinstance(model, fastddp.DistributedDataParallel)
    (model.module if wrapped else model).events = events
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        events.tick()
        if step == 1:
            with model.no_sync() if wrapped else contextlib.nullcontext():
                model(torch.ones(4, 8)).sum().backward()
        model(torch.ones(4, 8)).sum().backward()
        events.tick()
        optimizer.step()


def _lose_a_rank(rank: int, world_size: int, fault: Fault, engine: str) -> Survived:
    tempfile.tempdir = None  # the fork server may have found another
    assert tempfile.gettempdir() == os.environ["TMPDIR"], "else what is left would not be seen"
    pids = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    model = fastddp.DistributedDataParallel(
        make_model(fault.buffers), engine=engine, bucket_cap_mb=1e-6, process_group=group
    )
    events = Events(fault.event if rank == fault.victim else 0, fault.with_signal)
    with pytest.raises(RuntimeError) as caught:
        train(model, events)
    waited_s = time.monotonic() - events.last_at
    _kill_when_all_have_seen_it(rank, world_size, pids[fault.victim])
    return Survived(str(caught.value), waited_s, pids)


def _kill_when_all_have_seen_it(rank: int, world_size: int, victim_pid: int) -> None:
    """Ends the stopped rank, which would stay for ever; not before each survivor has its error."""
    (scratch_folder() / f"seen-by-{rank}").touch()
    if len(list(scratch_folder().glob("seen-by-*"))) == world_size - 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim_pid, signal.SIGKILL)


def _check(fault: Fault, engine: str, tmp_path: Path) -> list[Survived]:
    """Runs the loop and checks all but what the errors say."""
    survivors = run_ranks(
        _lose_a_rank,
        fault.world_size,
        fault,
        engine,
        expect_dead=[fault.victim],
        env={"TMPDIR": str(tmp_path)},
    )
    assert survivors.pop(fault.victim) == Died(-signal.SIGKILL)
    for survived in survivors:
        assert survived.waited_s < 5 * GROUP_TIMEOUT_S
    pids = survivors[0].pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)  # each rank is its own process group's leader
    assert list(tmp_path.iterdir()) == []
    assert shared_files_of(pids) == []
    return survivors


@pytest.mark.parametrize("seed", slow_but_for(range(2), range(SEEDS)))
def test_the_others_are_told_and_nothing_is_left(seed: int, engine: str, tmp_path: Path) -> None:
    fault = fault_of(seed)
    for survived in _check(fault, engine, tmp_path):
        where = (
            r"fastddp: rank \d: the (all-reduce of bucket \d of [68] \('layers\.\d.*'\)"
            r"|broadcast of \d buffers \('layers\..*\) before forward"
            r"|broadcast of the order in which gradients arrive) failed: ."
        )
        assert re.match(where, survived.message), (fault, survived)


def test_a_rank_lost_before_a_broadcast_of_buffers(engine: str, tmp_path: Path) -> None:
    fault = Fault(world_size=2, victim=0, with_signal=int(signal.SIGKILL), event=1, buffers=True)
    (survived,) = _check(fault, engine, tmp_path)
    assert re.match("fastddp: rank 1: .*buffers.* failed: .", survived.message), survived
