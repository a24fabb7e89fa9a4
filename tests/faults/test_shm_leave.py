"""A rank that ends in some other way than by a signal, or leaves the group, or is stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from tests.faults.holdings import Holdings, destroy
from tests.ranks import init_group, run_ranks, scratch_folder

pytestmark = pytest.mark.usefixtures("needs_shm")

TIMEOUT_S = 1.5
TOLD_WITHIN_S = 15.0
"""Promised are 2 s. A busy machine may take longer, but not until the group's timeout of 20 s."""


def set_up(way: str, timeout_s: float) -> Callable[[], None]:
    """Returns what communicates once: a plain collective, or a step of training."""
    if way == "shm":
        init_group("shm", timeout_s)
        return lambda: dist.all_reduce(torch.ones(100_000))
    init_group("gloo", timeout_s)
    model = fastddp.wrap(nn.Linear(300, 300))
    return lambda: model(torch.ones(1, 300)).sum().backward()


def as_another_process(end: Callable[[], None]) -> None:
    """Ends this process in the way in which an interpreter that called `end` would.

    A rank of these tests is a function in a forked process, so what it raises ends nothing.
    """
    try:
        end()
    except SystemExit as error:
        status = error.code
    except Exception:
        status = 1
    else:
        status = 0
    os._exit(int(status or 0))


def _first_cause(rank: int, world_size: int) -> str | None:
    """Rank 2 is killed, rank 1 ends over that, and rank 0 waits for a message of rank 1's."""
    init_group("shm", 40)
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        as_another_process(lambda: dist.recv(torch.ones(9), 2))
    with pytest.raises(RuntimeError) as caught:
        dist.recv(torch.ones(9), 1)
    return str(caught.value)


def test_who_waits_for_a_rank_that_ended_over_another_hears_of_that_one() -> None:
    message = run_ranks(_first_cause, 3, init_group=False, expect_dead=[1, 2])[0]
    assert re.search(r"failed: rank 2 \(process \d+\) was killed by signal 9", message), message


def end_normally() -> None:
    """Just returns."""


def end_with_exception() -> None:
    raise KeyError("oh")


def end_with_sys_exit() -> None:
    sys.exit(3)


def end_at_once() -> None:
    os._exit(7)


ENDS = {end_normally: 0, end_with_exception: 1, end_with_sys_exit: 3, end_at_once: 7}


def twice(step: Callable[[], None]) -> None:
    """Who was lost right after a collective may have done its part of it."""
    step()
    step()


def _lose_the_last(rank: int, world_size: int, way: str, end: Callable[[], None]) -> str:
    before = Holdings.now()
    step = set_up(way, 20)
    for _ in range(3):
        step()
    if rank == world_size - 1:
        as_another_process(end)
    began = time.monotonic()

    with pytest.raises(RuntimeError) as caught:
        twice(step)
    assert time.monotonic() - began < TOLD_WITHIN_S
    message = str(caught.value)
    del step, caught
    destroy()
    before.check_same_but_for_my_heap()
    return message


@pytest.mark.parametrize("way", ["shm", "wrap"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_the_others_are_told_how_a_rank_ended(way: str, end: Callable[[], None]) -> None:
    for message in run_ranks(_lose_the_last, 3, way, end, init_group=False, expect_dead=[2])[:2]:
        assert re.search(
            rf"collective \d+ \(all_reduce of \d+ float32, \w+.*\) failed: rank 2 \(process \d+\) "
            rf"(exited with status {ENDS[end]}|has ended) before it took part",
            message,
        ), message


def _leave_early(rank: int, world_size: int) -> str | None:
    before = Holdings.now()
    step = set_up("shm", 20)
    step()
    if rank == 0:
        destroy()
        before.check_same_but_for_my_heap()
        (scratch_folder() / "left").touch()
        while len(list(scratch_folder().glob("told-*"))) < world_size - 1:
            time.sleep(0.01)
        return None
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        step()
    assert time.monotonic() - began < TOLD_WITHIN_S
    (scratch_folder() / f"told-{rank}").touch()
    destroy()
    return str(caught.value)


def test_the_others_are_told_that_a_rank_destroyed_the_group() -> None:
    for message in run_ranks(_leave_early, 3, init_group=False)[1:]:
        assert re.search(
            r"collective 3 \(all_reduce of 100000 float32, sum\) failed: rank 0 has left the group "
            r"before it took part; it called destroy_process_group",
            message,
        ), message


def _finish_after_another_has_left(rank: int, world_size: int) -> None:
    """What a rank has done its part of can be finished without it."""
    init_group("shm", 20)
    for numel in (3, 100_000):
        tensor = torch.full((numel,), 1.0)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((numel,), float(world_size)))
    if rank == 1:
        time.sleep(0.2)
    dist.destroy_process_group()


def test_leaving_after_the_last_collective_disturbs_nobody() -> None:
    run_ranks(_finish_after_another_has_left, 3, init_group=False)


# ---- a stopped rank ----------------------------------------------------------------------


@contextlib.contextmanager
def no_sooner_than(seconds: float, rank: int) -> Iterator[None]:
    """Fails if the body ends too soon after the first rank has come to its own.

    One rank that runs into the timeout tells the others, whose own would have come later.
    """
    began = scratch_folder() / f"began-{rank}"
    began.with_suffix(".new").write_text(str(time.monotonic()))
    began.with_suffix(".new").rename(began)  # whole, or not there
    yield
    first = min(float(path.read_text()) for path in began.parent.glob("began-?"))
    assert time.monotonic() - first >= seconds


def _stop_one(rank: int, world_size: int, way: str) -> str:
    """Rank 1 stops before a collective."""
    before = Holdings.now()
    step = set_up(way, TIMEOUT_S)
    for _ in range(3):
        step()
    (scratch_folder() / f"{rank}").write_text(str(os.getpid()))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # goes on from here
        with pytest.raises(RuntimeError) as caught:
            step()
    else:
        pid = _pid_of(1)
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.001)
        with no_sooner_than(TIMEOUT_S, rank), pytest.raises(RuntimeError) as caught:
            step()
        (scratch_folder() / f"told-{rank}").touch()
        while len(list(scratch_folder().glob("told-*"))) < world_size - 1:
            time.sleep(0.01)
        os.kill(pid, signal.SIGCONT)
    message = str(caught.value)
    del step, caught
    destroy()
    before.check_same_but_for_my_heap()
    return message


def _pid_of(rank: int) -> int:
    path = scratch_folder() / f"{rank}"
    while not path.exists() or not path.read_text():
        time.sleep(0.001)
    return int(path.read_text())


@pytest.mark.parametrize("way", ["shm", "wrap"])
def test_a_stopped_rank_runs_into_the_timeout_and_raises_when_it_goes_on(way: str) -> None:
    for rank, message in enumerate(run_ranks(_stop_one, 3, way, init_group=False)):
        assert re.search(
            rf"fastddp: rank {rank}: collective \d+ \(all_reduce of \d+ float32, \w+.*\) failed: "
            r"timed out: rank 1 \(process \d+\) is stopped and has not called it",
            message,
        ), message
