"""Deadlines, abort and destroy: whatever waits in a collective can be freed from it."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastddp.comm import shm
from tests.faults.holdings import Holdings, destroy
from tests.ranks import init_group, run_ranks, scratch_folder

pytestmark = pytest.mark.usefixtures("needs_shm")

CPU = torch.device("cpu")
SHORT = timedelta(seconds=0.5)
MARGIN_S = 15.0
"""For a machine that is busy with other things; the longer timeouts here are of 40 s."""
PATIENCE_S = 5.0
"""So long who destroys a group lets the others come to what is under way."""
TIMED_OUT = (
    r"fastddp: rank 0: collective \d+ \(all_reduce of 9 float32, sum\) failed: "
    r"timed out: rank 1 \(process \d+\) is running and has not called it"
)


def wait_for(name: str) -> None:
    while not (scratch_folder() / name).exists():
        time.sleep(0.005)


def say(name: str) -> None:
    (scratch_folder() / name).touch()


def set_pg_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Set a group's timeout by torch's own function, public or, before 2.14, not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, that it is only supported by gloo
        if hasattr(dist, "set_timeout"):
            dist.set_timeout(timeout, group)
        else:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def _time_out(rank: int, world_size: int, where: str, in_background: bool) -> str | None:
    init_group("shm", 0.5 if where == "init" else 40)
    group = dist.new_group(backend="shm", timeout=SHORT) if where == "new_group" else None
    group = group or dist.group.WORLD
    dist.barrier(group)
    if rank == 1:
        wait_for("told")
        return None
    tensor = torch.ones(9)
    options = dist.AllreduceOptions()
    options.asyncOp = in_background
    if where == "call":
        options.timeout = SHORT
    if where == "set_timeout":
        group.set_timeout(SHORT)
    if where == "set_pg_timeout":
        set_pg_timeout(SHORT, group)
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        group.allreduce([tensor], options).wait()
    assert 0.5 <= time.monotonic() - began < 0.5 + MARGIN_S
    say("told")
    return str(caught.value)


@pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("where", ["init", "new_group", "call", "set_timeout", "set_pg_timeout"])
def test_a_timeout_wherever_it_is_set(where: str, in_background: bool) -> None:
    message = run_ranks(_time_out, 2, where, in_background, init_group=False)[0]
    assert re.match(TIMED_OUT, message), message


def _later_timeouts(rank: int, world_size: int) -> list[str]:
    """Of what gloo carries out, and of a group that shares its memory behind a gloo group."""
    init_group("gloo", 40)
    behind = shm.counterpart(dist.group.WORLD, CPU)
    assert behind is not dist.group.WORLD
    groups = [dist.new_group(backend="shm"), behind]
    set_pg_timeout(SHORT, groups[0])
    set_pg_timeout(SHORT, dist.group.WORLD)  # gloo's own, so that of both
    if rank == 1:
        wait_for("told")
        return []
    options = dist.ReduceOptions()
    messages = []
    for group in groups:
        for call in (
            lambda group=group: group.allreduce([torch.ones(9)]),
            lambda group=group: group.reduce([torch.ones(9)], options),
        ):
            began = time.monotonic()
            with pytest.raises(RuntimeError) as caught:
                call().wait()
            assert time.monotonic() - began < 0.5 + MARGIN_S
            messages.append(str(caught.value))
    say("told")
    return messages


def test_a_timeout_that_is_set_later_holds_whoever_carries_it_out() -> None:
    messages = run_ranks(_later_timeouts, 2, init_group=False)[0]
    assert len(messages) == 4
    for message in messages:
        assert "timed out: rank 1 (process" in message, message


def _give_up_waiting(rank: int, world_size: int) -> None:
    """A timeout of wait() alone: the collective goes on."""
    init_group("shm", 40)
    tensor = torch.ones(9)
    if rank == 1:
        wait_for("gave up")
        dist.all_reduce(tensor)
    else:
        work = dist.all_reduce(tensor, async_op=True)
        with pytest.raises(RuntimeError, match="did not end within 100 ms"):
            work.wait(timedelta(milliseconds=100))
        assert not work.is_completed()
        say("gave up")
        work.wait()
    assert tensor.tolist() == [2.0] * 9


def test_who_gives_up_waiting_can_wait_again() -> None:
    run_ranks(_give_up_waiting, 2, init_group=False)


def _register_again(rank: int, world_size: int) -> None:
    """As on import, with a torch that has less of what is private."""
    c10d = dist.distributed_c10d
    old, world = c10d._set_pg_timeout, c10d._world
    try:
        dist.set_timeout = object()
        shm._follow_timeouts()
        assert c10d._set_pg_timeout is old, "torch's own function reaches shm"
        del dist.set_timeout, c10d._set_pg_timeout
        shm._follow_timeouts()
        assert not hasattr(c10d, "_set_pg_timeout")
        del c10d._world
        shm._end_pending()
    finally:
        c10d._set_pg_timeout, c10d._world = old, world


def test_a_torch_without_its_private_names_is_no_error() -> None:
    run_ranks(_register_again, 1)


# ---- abort -------------------------------------------------------------------------------


def _abort(rank: int, world_size: int, in_background: bool) -> str:
    """Rank 0 waits for rank 1 in a collective; another thread of it aborts the group."""
    before = Holdings.now()
    init_group("shm", 40)
    dist.barrier()
    backend = dist.group.WORLD._get_backend(CPU)
    options = dist.AllreduceOptions()
    options.asyncOp = in_background
    if rank == 0:
        threading.Timer(0.2, backend.abort).start()
        began = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            dist.group.WORLD.allreduce([torch.ones(9)], options).wait()
        assert time.monotonic() - began < MARGIN_S
        say("aborted")
    else:
        wait_for("aborted")
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(9))
    message = str(caught.value)
    del backend, caught
    destroy()
    before.check_same_but_for_my_heap()
    return message


@pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])
def test_abort_from_another_thread(in_background: bool) -> None:
    for rank, message in enumerate(run_ranks(_abort, 2, in_background, init_group=False)):
        assert message.startswith(
            f"fastddp: rank {rank}: collective 3 (all_reduce of 9 float32, sum) failed: "
            "rank 0 has aborted the group"
        ), message


# ---- destroy -----------------------------------------------------------------------------


def _destroy_while_a_callback_runs(rank: int, world_size: int) -> None:
    init_group("shm", 3.0)
    if rank == 1:
        wait_for("chained")  # what is chained to a finished collective runs in the caller
        dist.all_reduce(torch.ones(9))
        wait_for("destroyed")
        return
    entered, may_end, ended = (threading.Event() for _ in range(3))

    def chained(future: torch.futures.Future) -> None:
        entered.set()
        may_end.wait(60)
        ended.set()

    future = dist.all_reduce(torch.ones(9), async_op=True).get_future().then(chained)
    say("chained")
    assert entered.wait(20)
    dist.destroy_process_group()
    say("destroyed")
    assert not ended.is_set()
    may_end.set()  # the thread that was left behind goes on, and ends
    future.wait()
    assert ended.is_set()


def test_destroy_does_not_wait_for_a_callback_for_ever() -> None:
    run_ranks(_destroy_while_a_callback_runs, 2, init_group=False)


def _destroy_while_pending(rank: int, world_size: int) -> str | None:
    before = Holdings.now()
    init_group("shm", 40)
    dist.barrier()
    if rank == 1:
        wait_for("destroyed")
        destroy()
        return None
    tensor = torch.ones(100_000)
    called: list[object] = []
    work = dist.all_reduce(tensor, async_op=True)
    work.get_future().add_done_callback(called.append)
    began = time.monotonic()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError) as caught:
        work.wait()
    message = str(caught.value)
    assert time.monotonic() - began < PATIENCE_S + MARGIN_S
    assert len(called) == 1
    called.clear()
    del work, caught
    gc.collect()
    before.check_same_but_for_my_heap()
    say("destroyed")
    return message


def test_destroy_with_a_collective_under_way_fails_it() -> None:
    message = run_ranks(_destroy_while_pending, 2, init_group=False)[0]
    assert "rank 0 has left the group with collectives under way" in message, message


def resident_bytes() -> int:
    """Returns what the process occupies, without what its allocator keeps although it is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _make_anew(rank: int, world_size: int, count: int) -> None:
    before = Holdings.now()
    memory: list[int] = []
    for i in range(count):
        dist.init_process_group(
            "shm",
            init_method=f"file://{scratch_folder()}/store-{i}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=20),
        )
        backend = dist.group.WORLD._get_backend(CPU)
        heap = backend.allocate_tensor(1_000_000, dtype=torch.float32, device=CPU)
        for tensor in (heap.fill_(1), torch.ones(1_000_000)):
            dist.all_reduce(tensor)
            dist.all_reduce(tensor, async_op=True).wait()
            assert tensor[-1] == world_size**2
        dist.barrier()  # what is freed may be another's source
        del backend, tensor, heap
        destroy()
        before.check_same_but_for_my_heap()
        memory.append(resident_bytes())
    # The allocator may keep freed tensors or not. What a round left behind, 8 MB of tensors or a
    # segment of 1 MB, would be 40 MB or more by the end.
    assert memory[-1] - memory[5] < 20 << 20, memory


def test_making_the_group_anew_takes_no_more_memory() -> None:
    run_ranks(_make_anew, 2, 50, init_group=False)
