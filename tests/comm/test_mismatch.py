"""What goes wrong between ranks is an error on all of them that names both sides, never a hang.

Gloo compares nothing: it hangs, or reduces memory that is not there. So what ranks do not agree on
is tested on other backends only; timeouts, wrong arguments and lost ranks are tested on all, gloo's
messages aside.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from fastddp import extension
from tests.comm.common import (
    case,
    expect,
    given,
    kinds_of_memory,
    not_gloo,
    operand,
    reduced,
    run_group,
)
from tests.ranks import Died, scratch_folder
from tests.slow import slow_but_for

DEADLINE_S = 20.0  # a mismatch is found at once, not by a timeout

Collective = Callable[[dist.ProcessGroup], object]


def _all_reduce(
    numel: int, dtype: torch.dtype = torch.float32, op: dist.ReduceOp = dist.ReduceOp.SUM
) -> Collective:
    return lambda group: dist.all_reduce(torch.ones(numel, dtype=dtype), op=op, group=group)


def _broadcast(numel: int, root: int = 0) -> Collective:
    return lambda group: dist.broadcast(torch.ones(numel), group_src=root, group=group)


def _all_gather(numel: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        dist.all_gather_into_tensor(
            torch.ones(numel * group.size()), torch.ones(numel), group=group
        )

    return call


def _reduce_scatter(numel: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        out, flat = torch.ones(numel), torch.ones(numel * group.size())
        dist.reduce_scatter_tensor(out, flat, group=group)

    return call


def _barrier(group: dist.ProcessGroup) -> None:
    dist.barrier(group=group)


def _gather(numel: int, root: int = 0, dtype: torch.dtype = torch.float32) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        one = torch.ones(numel, dtype=dtype)
        outputs = [one.clone() for _ in range(group.size())] if group.rank() == root else None
        dist.gather(one, outputs, group_dst=root, group=group)

    return call


def _scatter(numel: int, root: int = 0, dtype: torch.dtype = torch.float32) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        one = torch.ones(numel, dtype=dtype)
        inputs = [one.clone() for _ in range(group.size())] if group.rank() == root else None
        dist.scatter(one, inputs, group_src=root, group=group)

    return call


def _reduce(
    numel: int,
    root: int = 0,
    dtype: torch.dtype = torch.float32,
    op: dist.ReduceOp = dist.ReduceOp.SUM,
) -> Collective:
    return lambda group: dist.reduce(
        torch.ones(numel, dtype=dtype), group_dst=root, op=op, group=group
    )


def _all_to_all(numel: int, dtype: torch.dtype = torch.float32) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        flat = torch.ones(numel * group.size(), dtype=dtype)
        dist.all_to_all_single(torch.empty_like(flat), flat, group=group)

    return call


def _all_to_all_uneven(gives: int, takes: int) -> Collective:
    """Everybody gives each rank so many rows of three, and takes so many from each."""

    def call(group: dist.ProcessGroup) -> None:
        out, flat = (torch.ones(n * group.size(), 3) for n in (takes, gives))
        dist.all_to_all_single(out, flat, *([n] * group.size() for n in (takes, gives)), group)

    return call


def _all_to_all_list(numel: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        lists = ([torch.ones(numel) for _ in range(group.size())] for _ in range(2))
        dist.all_to_all(*lists, group=group)

    return call


def _all_gather_coalesced(*sizes: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        outputs = [[torch.ones(n) for n in sizes] for _ in range(group.size())]
        group.allgather_coalesced(outputs, [torch.ones(n) for n in sizes]).wait()

    return call


def _reduce_scatter_uneven(first: int) -> Collective:
    def call(group: dist.ProcessGroup) -> None:
        inputs = [torch.ones(first if r == 0 else 5) for r in range(group.size())]
        dist.reduce_scatter(torch.ones_like(inputs[group.rank()]), inputs, group=group)

    return call


def _sparse(rows: int) -> Collective:
    return lambda group: dist.all_reduce(torch.ones(rows, 2).to_sparse(1), group=group)


class Mismatch(NamedTuple):
    """What the last rank does, what all others do, and what tells the two apart in the message."""

    last: Collective
    others: Collective
    said: tuple[str, str]  # patterns


ALL_REDUCE = "all.?reduce"
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX
MISMATCHES = {
    "number of elements": Mismatch(_all_reduce(1023), _all_reduce(1024), ("1023", "1024")),
    "number of elements, long": Mismatch(
        _all_reduce(400_001), _all_reduce(400_000), ("400001", "400000")
    ),
    "short and long": Mismatch(_all_reduce(1), _all_reduce(400_000), (r"\b1\b", "400000")),
    "empty and not": Mismatch(_all_reduce(0), _all_reduce(7), (r"\b0\b", r"\b7\b")),
    "dtypes of one size": Mismatch(
        _all_reduce(9), _all_reduce(9, torch.int32), ("float32", "int32")
    ),
    "dtypes": Mismatch(_all_reduce(9), _all_reduce(9, torch.bfloat16), ("float32", "bfloat16")),
    "operations": Mismatch(_all_reduce(9, op=SUM), _all_reduce(9, op=MAX), ("sum", "max")),
    "order: all_reduce and broadcast": Mismatch(
        _all_reduce(9), _broadcast(9), (ALL_REDUCE, "broadcast")
    ),
    "order: all_reduce and barrier": Mismatch(_all_reduce(9), _barrier, (ALL_REDUCE, "barrier")),
    "order: all_gather and reduce_scatter": Mismatch(
        _all_gather(9), _reduce_scatter(9), ("all.?gather", "reduce.?scatter")
    ),
    "order: all_reduce and gather": Mismatch(_all_reduce(9), _gather(9), (ALL_REDUCE, "gather")),
    "order: gather and all_to_all": Mismatch(
        _gather(9), _all_to_all(9), ("gather", "all.?to.?all")
    ),
    "elements of a reduce": Mismatch(
        _reduce(9), _reduce(4), ("reduce with root 0 of 9 float32", "reduce with root 0 of 4 float")
    ),
    "dtypes of a reduce": Mismatch(
        _reduce(9), _reduce(9, dtype=torch.int32), ("9 float32, sum", "9 int32, sum")
    ),
    "operations of a reduce": Mismatch(
        _reduce(9), _reduce(9, op=MAX), ("9 float32, sum", "9 float32, max")
    ),
    "roots of a reduce": Mismatch(_reduce(9), _reduce(9, root=1), ("root 0", "root 1")),
    "elements of a gather": Mismatch(_gather(9), _gather(4), ("9 float32", "4 float32")),
    "dtypes of a gather": Mismatch(
        _gather(9), _gather(9, dtype=torch.int32), ("9 float32", "9 int32")
    ),
    "elements of a scatter": Mismatch(_scatter(9), _scatter(4), ("9 float32", "4 float32")),
    "dtypes of a scatter": Mismatch(
        _scatter(9), _scatter(9, dtype=torch.float64), ("9 float32", "9 float64")
    ),
    "reduce and scatter": Mismatch(_reduce(9), _scatter(9), ("called reduce", "called scatter")),
    "dtypes of an all_to_all": Mismatch(
        _all_to_all(9), _all_to_all(9, torch.int32), ("float32", "int32")
    ),
    "splits of an all_to_all": Mismatch(
        _all_to_all_uneven(3, 3),
        _all_to_all_uneven(2, 2),
        ("9 elements|takes 9", "6 elements|takes 6"),
    ),
    "tensors of an all_to_all": Mismatch(
        _all_to_all_list(9), _all_to_all_list(4), ("9 elements|takes 9", "4 elements|takes 4")
    ),
    "several tensors of an all_gather": Mismatch(
        _all_gather_coalesced(3, 7), _all_gather_coalesced(7, 3), ("3 float32, 7", "7 float32, 3")
    ),
    "uneven parts of a reduce_scatter": Mismatch(
        _reduce_scatter_uneven(9), _reduce_scatter_uneven(8), ("9 float32", "8 float32")
    ),
    "shapes of a sparse all_reduce": Mismatch(_sparse(9), _sparse(4), ("9, 2", "4, 2")),
    "an all_reduce of complex and of real numbers": Mismatch(
        # As the backend gets it: dist.all_reduce makes pairs of complex numbers before.
        lambda group: group.allreduce([torch.ones(9, dtype=torch.complex64)]).wait(),
        _all_reduce(18),
        ("18 float32 in complex64", "18 float32,"),
    ),
    "a broadcast of complex numbers and of bytes": Mismatch(
        lambda group: group.broadcast([torch.ones(2, dtype=torch.complex64)]).wait(),
        lambda group: group.broadcast([torch.ones(16, dtype=torch.uint8)]).wait(),
        ("16 uint8 in complex64", "16 uint8,|16 uint8$"),
    ),
    "roots of a broadcast": Mismatch(_broadcast(9), _broadcast(9, root=1), (r"\b0\b", r"\b1\b")),
    "roots of a gather": Mismatch(_gather(9), _gather(9, root=1), (r"\b0\b", r"\b1\b")),
    "elements of a broadcast": Mismatch(_broadcast(9), _broadcast(10), (r"\b9\b", r"\b10\b")),
    "elements of an all_gather": Mismatch(_all_gather(9), _all_gather(10), (r"\b9\b", r"\b10\b")),
    "elements of a reduce_scatter": Mismatch(
        _reduce_scatter(9), _reduce_scatter(10), (r"\b9\b", r"\b10\b")
    ),
}


def _says(message: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, message, re.IGNORECASE), f"no {pattern!r} in {message!r}"


def _mismatches(rank: int, world_size: int) -> None:
    last = world_size - 1
    timeout = timedelta(seconds=DEADLINE_S)
    for name, (differently, alike, said) in MISMATCHES.items():
        with case(name):
            group, beside = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)
            _all_reduce(5)(group)
            with pytest.raises(RuntimeError) as caught:
                (differently if rank == last else alike)(group)
            # Both sides: the odd one, and one of the others.
            _says(str(caught.value), rf"rank {last}\b", rf"rank [0-{last - 1}]\b", *said)
            # The group stays broken, and says why; others are as they were.
            with pytest.raises(RuntimeError) as again:
                _all_reduce(5)(group)
            _says(str(again.value), *said)
            x = given(rank, 1000)
            dist.all_reduce(x, group=beside)
            expect(x, reduced(world_size, 1000))


@not_gloo
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_is_told_both_sides(backend, world_size):
    run_group(_mismatches, world_size, backend)


def _memory_is_left_alone(rank: int, world_size: int, backend: str) -> None:
    for kind in kinds_of_memory(backend):
        for sizes in ((1000, 1001), (400_000, 300_000), (1, 70_000)):
            with case(f"{sizes}, {kind}"):
                group = dist.new_group()
                x = operand(kind, given(rank, sizes[rank]))
                with pytest.raises(RuntimeError, match=str(sizes[1 - rank])):
                    dist.all_reduce(x.tensor, group=group)
                x.check_guards()
                expect(x.tensor, given(rank, sizes[rank]))


@not_gloo
def test_a_mismatch_leaves_memory_alone(backend):
    run_group(_memory_is_left_alone, 2, backend, backend)


def _labelled_all_reduce(label: int, numel: int = 640) -> Collective:
    def call(group: dist.ProcessGroup) -> object:
        # The label is that of the launch, also of what runs later.
        native = extension.load()
        previous = native.set_label(label)
        work = dist.all_reduce(torch.ones(numel), group=group, async_op=True)
        assert native.set_label(previous) == label
        return work.wait()

    return call


def _owners_differ(rank: int, world_size: int) -> None:
    native = extension.load()
    native.name_owner(1, "model 'Critic' (the first one wrapped)")
    native.name_owner(2, "model 'Critic' (the second one wrapped)")
    first, second, others = 1 << 32 | 4, 2 << 32 | 4, 1 << 32 | 5
    hint = "same order on all ranks"
    bucket = "bucket 4 of model 'Critic' .the {} one wrapped."
    cases = {
        "owners": (first, second, (bucket.format("first"), bucket.format("second"), hint)),
        "buckets": (first, others, (bucket.format("first"), "bucket 5 of model 'Critic' .the fi")),
        "the script's own": (first, 0, (bucket.format("first"), "for the script itself")),
    }
    for name, (even, odd, said) in cases.items():
        with case(name):
            group = dist.new_group()
            _labelled_all_reduce(first)(group)
            with pytest.raises(RuntimeError) as caught:
                _labelled_all_reduce(even if rank == 0 else odd)(group)
            _says(str(caught.value), "rank 0 called", "rank 1 called", *said)


@not_gloo
def test_collectives_of_different_owners_never_meet(backend):
    run_group(_owners_differ, 2, backend)


def _async_mismatch(rank: int, world_size: int) -> None:
    group = dist.new_group()
    sizes = [(9, 9), (9, 9), (9, 10), (9, 9)]  # the third differs; the fourth follows it
    tensors = [given(rank, size[rank]) for size in sizes]
    works = [dist.all_reduce(x, group=group, async_op=True) for x in tensors]
    for i in (0, 1):
        works[i].wait()
        expect(tensors[i], reduced(world_size, 9))
    for i in (2, 3):
        with pytest.raises(RuntimeError) as caught:
            works[i].wait()
        _says(str(caught.value), r"\b9\b", r"\b10\b", "rank 0", "rank 1")
        with pytest.raises(RuntimeError):
            works[i].get_future().wait()
        assert works[i].is_completed()


@not_gloo
def test_works_in_flight_fail_from_the_mismatch_on(backend):
    run_group(_async_mismatch, 2, backend)


# --- a rank that does not come --------------------------------------------------------------------

TIMEOUT_S = 1.0
# What waits for all others: gloo's broadcast leaves its root once the data is sent.
WAIT_FOR_ALL = {ALL_REDUCE: _all_reduce(9), "barrier": _barrier}
WAIT_FOR_ALL_NATIVE = {
    **WAIT_FOR_ALL,
    "all.?gather": _all_gather(9),
    "reduce.?scatter": _reduce_scatter(9),
    "broadcast": _broadcast(9),
    ALL_REDUCE + " of many": _all_reduce(400_000),
}


def _missing(rank: int, world_size: int, backend: str, missing: int) -> None:
    waits = WAIT_FOR_ALL if backend == "gloo" else WAIT_FOR_ALL_NATIVE
    timeout = timedelta(seconds=TIMEOUT_S)
    for name, collective in waits.items():
        with case(name):
            group = dist.new_group(timeout=timeout)
            _all_reduce(5)(group)
            over = [scratch_folder() / f"over-{name}-{r}" for r in range(world_size)]
            if rank == missing:
                _wait_for(over[:rank] + over[rank + 1 :])
                continue
            with pytest.raises(RuntimeError) as caught:
                collective(group)
            over[rank].touch()
            if backend != "gloo":
                _says(str(caught.value), rf"rank {missing}\b", name.split(" of ")[0], "time")
                with pytest.raises(RuntimeError, match=rf"rank {missing}\b"):
                    _all_reduce(5)(group)


def _wait_for(files: list) -> None:
    until = time.monotonic() + DEADLINE_S
    while not all(file.exists() for file in files):
        assert time.monotonic() < until, files
        time.sleep(0.005)


@pytest.mark.parametrize("missing", slow_but_for([2], [0, 2]))
def test_a_rank_that_does_not_come_is_a_timeout(backend, missing):
    run_group(_missing, 3, backend, backend, missing)


def _missing_in_a_work(rank: int, world_size: int, backend: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    over = scratch_folder() / "over"
    if rank == 1:
        _wait_for([over])
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
            _wait_for([over])


def test_monitored_barrier_names_who_is_missing(backend):
    run_group(_monitored, 3, backend)


def _lost(rank: int, world_size: int, backend: str, how: str) -> None:
    for _ in range(11):
        _all_reduce(9)(dist.group.WORLD)
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    with pytest.raises(RuntimeError) as caught:
        _all_reduce(9)(dist.group.WORLD)
    if backend != "gloo":
        _says(str(caught.value), r"rank 1\b", ALL_REDUCE, r"collective 1[0-9]\b")
    (scratch_folder() / f"told-{rank}").touch()
    _wait_for([scratch_folder() / f"told-{r}" for r in range(world_size) if r != 1])


@pytest.mark.parametrize(("how", "status"), [("killed", -signal.SIGKILL), ("exits", 3)])
def test_a_rank_that_is_lost_is_named_before_the_timeout(backend, how, status):
    # The group's timeout is longer than the test's own.
    results = run_group(
        _lost, 3, backend, backend, how, expect_dead=[1], timeout=20.0, group_timeout_s=60.0
    )
    assert results[1] == Died(status)


# --- wrong arguments ------------------------------------------------------------------------------


def _calls_with_wrong_arguments(world_size: int) -> dict[str, tuple[Callable, str]]:
    """Map what is wrong to a call that all ranks make, and to what the message has to hold."""
    x, flat = torch.ones(4), torch.ones(4 * world_size)
    return {
        "an operation's name": (lambda: dist.all_reduce(x, op="sum"), ""),
        "a list for a tensor": (lambda: dist.all_reduce([x]), "list"),
        "no such root": (lambda: dist.broadcast(x, group_src=5), r"\b5\b"),
        "no such root of a reduce": (lambda: dist.reduce(x, group_dst=5), r"\b5\b"),
        "too few outputs": (lambda: dist.all_gather([x], x.clone()), rf"\b{world_size}\b.*\b1\b"),
        "outputs of another dtype": (
            lambda: dist.all_gather([x.double()] * world_size, x),
            "float64|Double",
        ),
        "outputs of another size": (
            lambda: dist.all_gather([torch.ones(3) for _ in range(world_size)], x),
            r"\b[34]\b",
        ),
        "output of another size": (
            lambda: dist.all_gather_into_tensor(torch.ones(4 * world_size + 1), x),
            r"\d",
        ),
        "too few inputs": (lambda: dist.reduce_scatter(x, [x.clone()]), "size|number|list"),
        "input of another size": (
            lambda: dist.reduce_scatter_tensor(x, torch.ones(4 * world_size + 1)),
            rf"\b{4 * world_size + 1}\b",
        ),
        "splits that do not add up": (
            lambda: dist.all_to_all_single(torch.ones(4 * world_size), flat, [1] * world_size),
            "(?i)split",
        ),
        "a message to oneself": (lambda: dist.send(x, dist.get_rank()), "rank"),
    }


def _wrong_arguments(rank: int, world_size: int) -> None:
    for name, (call, said) in _calls_with_wrong_arguments(world_size).items():
        with case(name):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=said):
                call()
            x = given(rank, 9)
            dist.all_reduce(x)
            expect(x, reduced(world_size, 9))


def _numbers_agree(rank: int, world_size: int) -> None:
    """Torch's own check of what ranks do compares the groups' sequence numbers, on gloo."""
    for _ in range(12):
        works = [dist.all_reduce(torch.ones(4), async_op=True) for _ in range(3)]
        dist.reduce(torch.ones(4), 0)
        for work in works:
            work.wait()
    dist.all_reduce(torch.ones(4))


@not_gloo
def test_debug_mode_finds_no_mismatch_where_there_is_none(backend, monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    run_group(_numbers_agree, 2, backend)


def _launches_are_counted(rank: int, world_size: int) -> None:
    group = dist.new_group()
    backend = group._get_backend(torch.device("cpu"))
    before = backend._get_sequence_number_for_group()
    if rank == 0:  # nobody else has come to any of them
        works = [dist.all_reduce(torch.ones(4), group=group, async_op=True) for _ in range(3)]
        works.append(dist.reduce(torch.ones(4), 0, group=group, async_op=True))
        assert backend._get_sequence_number_for_group() == before + 4
        (scratch_folder() / "counted").touch()
        for work in works:
            work.wait()
    else:
        _wait_for([scratch_folder() / "counted"])
        for _ in range(3):
            dist.all_reduce(torch.ones(4), group=group)
        dist.reduce(torch.ones(4), 0, group=group)
        assert backend._get_sequence_number_for_group() == before + 4


@not_gloo
def test_sequence_numbers_count_launches(backend):
    run_group(_launches_are_counted, 2, backend)


def test_wrong_arguments_are_refused_and_break_nothing(backend):
    run_group(_wrong_arguments, 2, backend)


# --- messages -------------------------------------------------------------------------------------


def _message(rank: int, sent: int, received: int, first: str, tag: int) -> str:
    """Rank 0 sends to rank 1; returns what this rank is told."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    dist.barrier(group)
    began = time.monotonic()
    is_first = (first == "sender") == (rank == 0)
    name = scratch_folder() / f"{sent}-{received}-{first}"
    if not is_first:
        _wait_for([name])

    def exchange() -> None:
        if rank == 0:
            work = dist.isend(torch.ones(sent), 1, group, tag)
        else:
            work = dist.irecv(torch.zeros(received), 0, group, tag)
        name.touch()
        work.wait()

    with pytest.raises(RuntimeError) as caught:
        exchange()
    assert time.monotonic() - began < DEADLINE_S
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1), group=group)
    return str(caught.value)


def _messages(rank: int, world_size: int) -> list[str]:
    said = []
    for sent, received in ((4, 8), (8, 4), (4, 0), (0, 4), (1_000_000, 999_999)):
        for first in ("sender", "receiver"):
            said.append(_message(rank, sent, received, first, sent % 3))
    # Sizes that differ are no error where the order, the tag or the sender is another.
    group = dist.new_group()
    if rank == 0:
        works = [dist.isend(torch.full((n,), n + 0.0), 1, group, n) for n in (3, 2, 1)]
        works += [dist.isend(torch.full((n,), n + 0.0), 1, group, 9) for n in (4, 5)]
    else:
        tensors = [torch.zeros(n) for n in (1, 2, 3, 4, 5)]
        works = [dist.irecv(x, 0, group, min(len(x), 9)) for x in tensors[:3]]
        works += [dist.irecv(x, 0, group, 9) for x in tensors[3:]]
    for work in works:
        work.wait()
    if rank == 1:
        assert all(bool((x == len(x)).all()) for x in tensors)
    # A receiver from anybody cannot know the size; what comes after it is right all the same.
    for n in range(40):
        x = torch.full((n,), 1.0 * n)
        if rank == 0:
            dist.send(x, 1, group, 5)
        else:
            y = torch.zeros(n)
            dist.recv(y, None if n % 3 == 1 else 0, group, tag=5)
            assert torch.equal(x, y)
    with pytest.raises((ValueError, RuntimeError)):  # refused, so it was no message
        dist.send(torch.ones(3), 1, group, tag=-1)
    dist.barrier(group)
    return said


@not_gloo
def test_messages_of_another_size_are_an_error(backend):
    by_rank = run_group(_messages, 2, backend, timeout=12.0)
    sizes = [s for s in ((4, 8), (8, 4), (4, 0), (0, 4), (1_000_000, 999_999)) for _ in range(2)]
    for said in by_rank:
        for text, (sent, received) in zip(said, sizes, strict=True):
            assert (
                f"the ranks do not agree: with tag {sent % 3}, rank 0 sends {4 * sent} bytes to "
                f"rank 1, which receives {4 * received}" in text
            ), text
