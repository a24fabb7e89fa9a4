"""What goes wrong between ranks is an error on all of them that names both sides, never a hang.

Gloo compares nothing: it hangs, or reduces memory that is not there. So what ranks do not agree on
is tested on other backends only; timeouts, wrong arguments and lost ranks are tested on all, gloo's
messages aside.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from fastddp import extension
from tests.comm.calls import (
    ALL_REDUCE,
    DEADLINE_S,
    Collective,
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    reduce_scatter,
    says,
)
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


SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX

MISMATCHES = {
    "number of elements": Mismatch(all_reduce(1023), all_reduce(1024), ("1023", "1024")),
    "number of elements, long": Mismatch(
        all_reduce(400_001), all_reduce(400_000), ("400001", "400000")
    ),
    "short and long": Mismatch(all_reduce(1), all_reduce(400_000), (r"\b1\b", "400000")),
    "empty and not": Mismatch(all_reduce(0), all_reduce(7), (r"\b0\b", r"\b7\b")),
    "dtypes of one size": Mismatch(all_reduce(9), all_reduce(9, torch.int32), ("float32", "int32")),
    "dtypes": Mismatch(all_reduce(9), all_reduce(9, torch.bfloat16), ("float32", "bfloat16")),
    "operations": Mismatch(all_reduce(9, op=SUM), all_reduce(9, op=MAX), ("sum", "max")),
    "order: all_reduce and broadcast": Mismatch(
        all_reduce(9), broadcast(9), (ALL_REDUCE, "broadcast")
    ),
    "order: all_reduce and barrier": Mismatch(all_reduce(9), barrier, (ALL_REDUCE, "barrier")),
    "order: all_gather and reduce_scatter": Mismatch(
        all_gather(9), reduce_scatter(9), ("all.?gather", "reduce.?scatter")
    ),
    "order: all_reduce and gather": Mismatch(all_reduce(9), _gather(9), (ALL_REDUCE, "gather")),
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
        all_reduce(18),
        ("18 float32 in complex64", "18 float32,"),
    ),
    "a broadcast of complex numbers and of bytes": Mismatch(
        lambda group: group.broadcast([torch.ones(2, dtype=torch.complex64)]).wait(),
        lambda group: group.broadcast([torch.ones(16, dtype=torch.uint8)]).wait(),
        ("16 uint8 in complex64", "16 uint8,|16 uint8$"),
    ),
    "roots of a broadcast": Mismatch(broadcast(9), broadcast(9, root=1), (r"\b0\b", r"\b1\b")),
    "roots of a gather": Mismatch(_gather(9), _gather(9, root=1), (r"\b0\b", r"\b1\b")),
    "elements of a broadcast": Mismatch(broadcast(9), broadcast(10), (r"\b9\b", r"\b10\b")),
    "elements of an all_gather": Mismatch(all_gather(9), all_gather(10), (r"\b9\b", r"\b10\b")),
    "elements of a reduce_scatter": Mismatch(
        reduce_scatter(9), reduce_scatter(10), (r"\b9\b", r"\b10\b")
    ),
}


def _mismatches(rank: int, world_size: int) -> None:
    last = world_size - 1
    timeout = timedelta(seconds=DEADLINE_S)
    for name, (differently, alike, said) in MISMATCHES.items():
        with case(name):
            group, beside = dist.new_group(timeout=timeout), dist.new_group(timeout=timeout)
            all_reduce(5)(group)
            with pytest.raises(RuntimeError) as caught:
                (differently if rank == last else alike)(group)
            # Both sides: the odd one, and one of the others.
            says(str(caught.value), rf"rank {last}\b", rf"rank [0-{last - 1}]\b", *said)
            # The group stays broken, and says why; others are as they were.
            with pytest.raises(RuntimeError) as again:
                all_reduce(5)(group)
            says(str(again.value), *said)
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
            says(str(caught.value), "rank 0 called", "rank 1 called", *said)


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
        says(str(caught.value), r"\b9\b", r"\b10\b", "rank 0", "rank 1")
        with pytest.raises(RuntimeError):
            works[i].get_future().wait()
        assert works[i].is_completed()


@not_gloo
def test_works_in_flight_fail_from_the_mismatch_on(backend):
    run_group(_async_mismatch, 2, backend)
