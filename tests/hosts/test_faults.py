"""What goes wrong on one host is an error on all of them, soon."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastddp import extension
from tests.hosts.common import allocate, backend_of, error_of, given, reduced, run_on_hosts
from tests.ranks import Died, scratch_folder
from tests.slow import slow_but_for

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
@pytest.mark.parametrize("hosts", slow_but_for(["abca"], ["aabb", "abbb", "abca"]))
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


def _owners_differ(rank: int, world_size: int) -> str:
    began = time.monotonic()
    extension.load().set_label((1 if rank < 2 else 2) << 32)
    message = error_of(lambda: dist.all_reduce(torch.ones(10)))
    _stay_until_all_have_raised(rank, world_size, began)
    return message


def test_hosts_that_reduce_for_different_owners_are_shown():
    messages = run_on_hosts(_owners_differ, "aabb", group_timeout_s=GROUP_TIMEOUT_S)
    called = "all_reduce of 10 float32, sum, for bucket 0 of the wrapped model number"
    for rank, message in enumerate(messages):
        here, there = (1, 2) if rank < 2 else (2, 1)
        shown = rf"here the ranks called {called} {here}, rank \d called {called} {there}; the"
        assert re.search(rf"{shown}|between hosts, among ranks", message), message
    assert any("the hosts do not agree" in message for message in messages)


def _handed_on_differently(rank: int, world_size: int) -> list[str]:
    messages = []
    for call in (
        lambda group, n: dist.reduce(torch.ones(n), 0, group=group),
        lambda group, n: dist.broadcast(torch.ones(n), 0, group=group),
        lambda group, n: dist.all_to_all_single(torch.ones(4 * n), torch.ones(4 * n), group=group),
    ):
        group = dist.new_group(backend="shm")
        messages.append(error_of(lambda call=call, group=group: call(group, 9 if rank < 2 else 4)))
    return messages


def test_hosts_that_do_not_agree_on_what_goes_through_gloo_are_shown():
    for messages in run_on_hosts(_handed_on_differently, "aabb", group_timeout_s=GROUP_TIMEOUT_S):
        for message, name in zip(messages[:2], ("reduce", "broadcast"), strict=True):
            called = rf"called {name} with root 0 of"
            assert re.search(rf"rank 0 {called} 9 float32.*, rank 2 {called} 4 float32", message)
        assert re.search("gives rank 2 9 elements, rank 2 takes 4 from it", messages[2]), messages


def _error_of_call(call: str, rank: int, world_size: int, began: float) -> str:
    if call == "all_reduce":
        message = error_of(lambda: dist.all_reduce(torch.ones(10)))
    else:
        message = error_of(lambda: dist.broadcast(torch.ones(10), 2))
    _stay_until_all_have_raised(rank, world_size, began)
    return message


def _abort(rank: int, world_size: int, call: str) -> str:
    began = time.monotonic()
    if rank == 1:
        time.sleep(0.5)
        backend_of().abort()
    return _error_of_call(call, rank, world_size, began)


@pytest.mark.parametrize(
    ("call", "said_elsewhere"),
    [
        ("all_reduce", "between hosts, among ranks "),
        ("broadcast", "[Cc]losed|[Cc]losing|pair closure"),
    ],
)
def test_a_rank_that_aborts_the_group_ends_it_on_all_hosts(call, said_elsewhere):
    messages = run_on_hosts(_abort, "aabb", call, group_timeout_s=GROUP_TIMEOUT_S)
    assert all("rank 1 has aborted the group" in message for message in messages[:2])
    assert all(re.search(said_elsewhere, message) for message in messages[2:]), messages


def _absent(rank: int, world_size: int) -> str:
    if rank == 3:
        time.sleep(4.0)
    return error_of(lambda: dist.all_reduce(torch.ones(10)))


def test_a_rank_that_does_not_come_runs_all_hosts_into_the_timeout():
    messages = run_on_hosts(_absent, "aabb", group_timeout_s=1.5)
    assert all("timed out" in m.lower() or "between hosts" in m for m in messages), messages


def _no_memory(rank: int, world_size: int) -> str:
    """Rank 0 has no room for a copy of what it gives: nothing is wrong with shared memory."""
    numel = 40_000_000
    if rank == 0:
        tensor = torch.empty(2 * numel)[::2]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + numel, used + numel))
    else:
        tensor = torch.empty(numel)
    began = time.monotonic()
    message = error_of(lambda: dist.all_reduce(tensor))
    _stay_until_all_have_raised(rank, world_size, began)
    return message


def test_a_rank_that_fails_for_itself_ends_it_on_all_hosts():
    messages = run_on_hosts(_no_memory, "aab", group_timeout_s=GROUP_TIMEOUT_S)
    assert "memory" in messages[0]
    assert re.search("rank 0 failed: .*memory", messages[1])
    assert "between hosts, among ranks 0, 2: " in messages[2]


def _refused(rank: int, world_size: int) -> list[str]:
    """What gloo refuses because of arguments that the ranks need not have alike."""

    def gather(count: int) -> None:
        outputs = [torch.empty(10) for _ in range(count)]
        dist.group.WORLD.allgather([outputs], [given(rank, 10)]).wait()
        for other, output in enumerate(outputs):
            assert torch.equal(output, given(other, 10))

    messages = [error_of(lambda: gather(3))]  # by all: the group goes on
    gather(world_size)
    began = time.monotonic()
    messages.append(error_of(lambda: gather(3 if rank < 2 else world_size)))
    _stay_until_all_have_raised(rank, world_size, began)
    return messages


def test_what_one_host_alone_refuses_is_an_error_on_all():
    results = run_on_hosts(_refused, "aabb", group_timeout_s=GROUP_TIMEOUT_S)
    for rank, (by_all, by_some) in enumerate(results):
        assert "expected length 4, got 3" in by_all, by_all
        assert "expected length 4, got 3" in by_some, by_some
        assert rank < 2 or "failed: rank 0 failed: " in by_some, by_some


def _refused_before(rank: int, world_size: int, call: str) -> str:
    """The hosts' next calls are alike, but one of them is one call further."""
    began = time.monotonic()
    if rank < 2:
        with pytest.raises(ValueError, match="overlap"):
            dist.all_reduce(torch.ones(1).expand(10))
    return _error_of_call(call, rank, world_size, began)


@pytest.mark.parametrize("call", ["all_reduce", "broadcast"])
def test_what_follows_a_call_that_one_host_refused_is_not_taken_for_it(call):
    messages = run_on_hosts(_refused_before, "aabb", call, group_timeout_s=GROUP_TIMEOUT_S)
    assert any(re.search("agree: .* as collective [23]", message) for message in messages), messages


def _later_timeout(rank: int, world_size: int) -> str | None:
    dist.all_reduce(torch.ones(9))
    dist.group.WORLD.set_timeout(timedelta(seconds=1))
    if rank < 2:
        message = error_of(lambda: dist.all_reduce(torch.ones(9)))
        (scratch_folder() / f"raised-{rank}").touch()
        return message
    _stay_until_all_have_raised(rank, world_size, time.monotonic())
    return None


def test_a_timeout_that_is_set_later_holds_between_hosts():
    messages = run_on_hosts(_later_timeout, "aab", group_timeout_s=GROUP_TIMEOUT_S)
    for message in messages[:2]:
        assert re.search("[Tt]imed out", message), message


def _two_groups(rank: int, world_size: int) -> None:
    broken = dist.new_group(backend="shm")
    whole = dist.new_group(backend="shm")
    error_of(lambda: dist.all_reduce(torch.ones(11 if rank == 0 else 10), group=broken))
    tensor = given(rank, 10)
    dist.all_reduce(tensor, group=whole)
    assert torch.equal(tensor, reduced([0, 1, 2, 3], 10))


def test_a_broken_group_leaves_others_whole():
    run_on_hosts(_two_groups, "abab", group_timeout_s=GROUP_TIMEOUT_S)
