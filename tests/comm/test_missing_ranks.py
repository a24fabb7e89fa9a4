"""A rank that does not come to a collective, or is lost before it, is named to the others."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.comm.calls import (
    ALL_REDUCE,
    DEADLINE_S,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    reduce_scatter,
    says,
    wait_for,
)
from tests.comm.common import case, expect, given, reduced, run_group
from tests.ranks import Died, scratch_folder
from tests.slow import slow_but_for

TIMEOUT_S = 1.0

# What waits for all others: gloo's broadcast leaves its root once the data is sent.
WAIT_FOR_ALL = {ALL_REDUCE: all_reduce(9), "barrier": barrier}

WAIT_FOR_ALL_NATIVE = {
    **WAIT_FOR_ALL,
    "all.?gather": all_gather(9),
    "reduce.?scatter": reduce_scatter(9),
    "broadcast": broadcast(9),
    ALL_REDUCE + " of many": all_reduce(400_000),
}


def _missing(rank: int, world_size: int, backend: str, missing: int) -> None:
    waits = WAIT_FOR_ALL if backend == "gloo" else WAIT_FOR_ALL_NATIVE
    timeout = timedelta(seconds=TIMEOUT_S)
    for name, collective in waits.items():
        with case(name):
            group = dist.new_group(timeout=timeout)
            all_reduce(5)(group)
            over = [scratch_folder() / f"over-{name}-{r}" for r in range(world_size)]
            if rank == missing:
                wait_for(over[:rank] + over[rank + 1 :])
                continue
            with pytest.raises(RuntimeError) as caught:
                collective(group)
            over[rank].touch()
            if backend != "gloo":
                says(str(caught.value), rf"rank {missing}\b", name.split(" of ")[0], "time")
                with pytest.raises(RuntimeError, match=rf"rank {missing}\b"):
                    all_reduce(5)(group)


@pytest.mark.parametrize("missing", slow_but_for([2], [0, 2]))
def test_a_rank_that_does_not_come_is_a_timeout(backend, missing):
    run_group(_missing, 3, backend, backend, missing)


def _missing_in_a_work(rank: int, world_size: int, backend: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    over = scratch_folder() / "over"
    if rank == 1:
        wait_for([over])
        return
    work = dist.all_reduce(given(rank, 9), group=group, async_op=True)
    future = dist.all_reduce(given(rank, 9), group=group, async_op=True).get_future()
    until = time.monotonic() + DEADLINE_S
    while not work.is_completed():  # also without wait()
        assert time.monotonic() < until
        time.sleep(0.005)
    named = "" if backend == "gloo" else "rank 1"
    with pytest.raises(RuntimeError, match=named):
        work.wait()
    with pytest.raises(RuntimeError, match=named):
        future.wait()
    over.touch()


def test_a_timeout_of_a_work(backend):
    run_group(_missing_in_a_work, 2, backend, backend)


def _late_but_in_time(rank: int, world_size: int) -> None:
    """The timeout is of each collective, not of the group's life."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    for i in range(4):
        if i % world_size == rank:
            time.sleep(0.4)
        x = given(rank, 1000)
        dist.all_reduce(x, group=group)
        expect(x, reduced(world_size, 1000))


def test_the_timeout_is_each_collectives(backend):
    run_group(_late_but_in_time, 2, backend)


def _monitored(rank: int, world_size: int) -> None:
    timeout = timedelta(seconds=TIMEOUT_S)
    for wait_all_ranks, named in ((False, r"Ranks? 1\b"), (True, r"Ranks? 1, 2\b")):
        group = dist.new_group()
        over = scratch_folder() / f"over-{wait_all_ranks}"
        if rank == 0:
            with pytest.raises(RuntimeError, match=named):
                group.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)
            over.touch()
        else:
            wait_for([over])


def test_monitored_barrier_names_who_is_missing(backend):
    run_group(_monitored, 3, backend)


def _lost(rank: int, world_size: int, backend: str, how: str) -> None:
    for _ in range(11):
        all_reduce(9)(dist.group.WORLD)
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    with pytest.raises(RuntimeError) as caught:
        all_reduce(9)(dist.group.WORLD)
    if backend != "gloo":
        says(str(caught.value), r"rank 1\b", ALL_REDUCE, r"collective 1[0-9]\b")
    (scratch_folder() / f"told-{rank}").touch()
    wait_for([scratch_folder() / f"told-{r}" for r in range(world_size) if r != 1])


@pytest.mark.parametrize(("how", "status"), [("killed", -signal.SIGKILL), ("exits", 3)])
def test_a_rank_that_is_lost_is_named_before_the_timeout(backend, how, status):
    # The group's timeout is longer than the test's own.
    results = run_group(
        _lost, 3, backend, backend, how, expect_dead=[1], timeout=20.0, group_timeout_s=60.0
    )
    assert results[1] == Died(status)
