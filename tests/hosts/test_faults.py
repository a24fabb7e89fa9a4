"""What goes wrong on one host is an error on all of them, soon."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.hosts.common import allocate, backend_of, error_of, given, reduced, run_on_hosts
from tests.ranks import Died, scratch_folder

# Far longer than any of these tests: an error that takes so long is none that came soon.
GROUP_TIMEOUT_S = 300.0
SOON_S = 20.0


def _stay_until_all_have_raised(rank: int, count: int, began: float) -> None:
    """Keep this rank alive: the others must not have to learn by its end that all is not well."""
    (scratch_folder() / f"raised-{rank}").touch()
    while len(list(scratch_folder().glob("raised-*"))) < count:
        assert time.monotonic() - began < SOON_S, "not all ranks have raised"
        time.sleep(0.02)


def _reduce_until_it_fails(rank: int, world_size: int, doomed: int, numel: int, own: bool) -> str:
    """All-reduce again and again; the doomed rank kills itself in the midst of it."""
    tensor = allocate(numel, torch.float32) if own else torch.empty(numel)
    began = time.monotonic()

    def reduce_again_and_again() -> None:
        for step in range(10_000):
            tensor.copy_(given(rank, numel))
            work = dist.all_reduce(tensor, async_op=True)
            if step == 3 and rank == doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            work.wait()

    message = error_of(reduce_again_and_again)
    _stay_until_all_have_raised(rank, world_size - 1, began)
    error_of(lambda: dist.all_reduce(tensor))  # not a hang in what comes after
    assert time.monotonic() - began < SOON_S
    return message


@pytest.mark.parametrize("doomed", [0, 1, 3])
@pytest.mark.parametrize(("numel", "own"), [(10, False), (3_000_000, True)])
@pytest.mark.parametrize("hosts", ["aabb", "abbb", "abca"])
def test_a_rank_that_dies_is_an_error_on_every_host(hosts, numel, own, doomed):
    results = run_on_hosts(
        _reduce_until_it_fails,
        hosts,
        doomed,
        numel,
        own,
        group_timeout_s=GROUP_TIMEOUT_S,
        expect_dead=[doomed],
    )
    assert results[doomed] == Died(-signal.SIGKILL)
    for rank, message in enumerate(results):
        if rank == doomed:
            continue
        assert re.match(rf"fastddp: rank {rank}: collective \d+ \(all_reduce of {numel} ", message)
        on_its_host = rf"rank {doomed} .* was killed by signal 9"
        between = r"between hosts, among ranks \d, \d(, \d)?: ."
        assert re.search(f"{on_its_host}|{between}", message), message


def _mismatch(rank: int, world_size: int) -> str:
    began = time.monotonic()
    message = error_of(lambda: dist.all_reduce(torch.ones(11 if rank == 3 else 10)))
    _stay_until_all_have_raised(rank, world_size, began)
    return message


def test_ranks_of_a_host_that_do_not_agree_are_shown_and_the_other_host_is_told():
    messages = run_on_hosts(_mismatch, "aabb", group_timeout_s=GROUP_TIMEOUT_S)
    for message in messages[2:]:
        assert "rank 2 called all_reduce of 10 float32" in message
        assert "rank 3 called all_reduce of 11 float32" in message
    for message in messages[:2]:
        assert "between hosts, among ranks " in message


def _hosts_differ(rank: int, world_size: int, numel: int, dtype: torch.dtype, op: str) -> str:
    began = time.monotonic()
    tensor = torch.ones(10) if rank < 2 else torch.ones(numel, dtype=dtype)
    message = error_of(lambda: dist.all_reduce(tensor, getattr(dist.ReduceOp, op)))
    _stay_until_all_have_raised(rank, world_size, began)
    return message


@pytest.mark.parametrize(
    ("numel", "dtype", "theirs"),
    [
        (11, torch.float32, "11 float32"),
        (3_000_000, torch.float32, "3000000 float32"),
        (10, torch.int32, "10 int32"),
    ],
)
def test_hosts_that_do_not_agree_are_shown(numel, dtype, theirs):
    messages = run_on_hosts(
        _hosts_differ, "aabb", numel, dtype, "MAX", group_timeout_s=GROUP_TIMEOUT_S
    )
    first, second = "all_reduce of 10 float32, maximum", f"all_reduce of {theirs}, maximum"
    for rank, message in enumerate(messages):
        here, there = (first, second) if rank < 2 else (second, first)
        shown = rf"the hosts do not agree: here the ranks called {here}, rank \d called {there}"
        # Or this rank's lane was closed by the other host, which had seen it before.
        assert re.search(rf"{shown}|between hosts, among ranks", message), message
    assert any("the hosts do not agree" in message for message in messages)


def _abort(rank: int, world_size: int) -> str:
    began = time.monotonic()
    if rank == 1:
        time.sleep(0.5)
        backend_of().abort()
    message = error_of(lambda: dist.all_reduce(torch.ones(10)))
    _stay_until_all_have_raised(rank, world_size, began)
    return message


def test_a_rank_that_aborts_the_group_ends_it_on_all_hosts():
    messages = run_on_hosts(_abort, "aabb", group_timeout_s=GROUP_TIMEOUT_S)
    assert all("rank 1 has aborted the group" in message for message in messages[:2])
    assert all("between hosts, among ranks " in message for message in messages[2:])


def _absent(rank: int, world_size: int) -> str:
    if rank == 3:
        time.sleep(4.0)
    return error_of(lambda: dist.all_reduce(torch.ones(10)))


def test_a_rank_that_does_not_come_runs_all_hosts_into_the_timeout():
    messages = run_on_hosts(_absent, "aabb", group_timeout_s=1.5)
    assert all("timed out" in m.lower() or "between hosts" in m for m in messages), messages


def _two_groups(rank: int, world_size: int) -> None:
    broken = dist.new_group(backend="shm")
    whole = dist.new_group(backend="shm")
    error_of(lambda: dist.all_reduce(torch.ones(11 if rank == 0 else 10), group=broken))
    tensor = given(rank, 10)
    dist.all_reduce(tensor, group=whole)
    assert torch.equal(tensor, reduced([0, 1, 2, 3], 10))


def test_a_broken_group_leaves_others_whole():
    run_on_hosts(_two_groups, "abab", group_timeout_s=GROUP_TIMEOUT_S)
