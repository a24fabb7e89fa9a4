"""Every other collective of torch.distributed, in all its forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.comm.common import (
    DTYPES,
    case,
    expect,
    given,
    is_refused,
    kinds_of_memory,
    lengths,
    operand,
    reduce_op,
    reduced,
    run_group,
)
from tests.ranks import scratch_folder
from tests.slow import slow_but_for

# An element beyond the share that fits a staging slot, for tensors that are cut into shares.
SIZES = (0, 1, 7, 1023, (128 << 10) // 4 + 1)
WORLD_SIZES = pytest.mark.parametrize("world_size", slow_but_for([1, 2, 3], [1, 2, 3, 4]))


def _run_all(rank: int, world_size: int, cases: list[Callable[[int, int], None]]) -> None:
    for check in cases:
        with case(check.__name__):
            check(rank, world_size)


# --- broadcast, all_gather ------------------------------------------------------------------------


def broadcast(rank: int, world_size: int) -> None:
    for root in range(world_size):
        for numel in SIZES:
            x = given(rank, numel)
            dist.broadcast(x, root)
            expect(x, given(root, numel))


def broadcast_coalesced(rank: int, world_size: int) -> None:
    """As models are made equal at the start: many tensors at once."""
    tensors = [given(rank, numel, start=i) for i, numel in enumerate((3, 0, 1023, 70_000))]
    dist._broadcast_coalesced(dist.group.WORLD, tensors, 1 << 16, world_size - 1)
    for i, x in enumerate(tensors):
        expect(x, given(world_size - 1, x.numel(), start=i))


def all_gather(rank: int, world_size: int) -> None:
    for numel in SIZES:
        outputs = [torch.full((numel,), -9.0) for _ in range(world_size)]
        dist.all_gather(outputs, given(rank, numel))
        for r, x in enumerate(outputs):
            expect(x, given(r, numel))


def all_gather_into_tensor(rank: int, world_size: int) -> None:
    for numel in SIZES:
        expected = torch.stack([given(r, numel) for r in range(world_size)])
        flat = torch.full((world_size * numel,), -9.0)
        dist.all_gather_into_tensor(flat, given(rank, numel))
        expect(flat, expected.flatten())
    # One behind the other in the first dimension.
    rows = torch.full((2 * world_size, 3), -9.0)
    dist.all_gather_into_tensor(rows, given(rank, 6).view(2, 3))
    expect(rows, torch.cat([given(r, 6).view(2, 3) for r in range(world_size)]))


def all_gather_in_place(rank: int, world_size: int) -> None:
    """The input is this rank's part of the output."""
    for numel in SIZES:
        flat = torch.full((world_size * numel,), -9.0)
        mine = flat[rank * numel : (rank + 1) * numel]
        mine.copy_(given(rank, numel))
        dist.all_gather_into_tensor(flat, mine)
        expect(flat, torch.cat([given(r, numel) for r in range(world_size)]))


def all_gather_of_strided_tensors(rank: int, world_size: int) -> None:
    base = torch.full((world_size, 14), -9.0)
    dist.all_gather([row[::2] for row in base], given(rank, 14)[::2])
    expect(base[:, ::2], torch.stack([given(r, 14)[::2] for r in range(world_size)]))
    assert bool((base[:, 1::2] == -9.0).all())


def all_gather_coalesced(rank: int, world_size: int) -> None:
    lists = [[torch.zeros(n) for n in (3, 7)] for _ in range(world_size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        dist.all_gather_coalesced(lists, [given(rank, 3), given(rank, 7, start=1)])
    for r, (three, seven) in enumerate(lists):
        expect(three, given(r, 3))
        expect(seven, given(r, 7, start=1))


# --- reduce, reduce_scatter -----------------------------------------------------------------------


def reduce(rank: int, world_size: int) -> None:
    for root in range(world_size):
        for op in ("SUM", "AVG", "PRODUCT", "MIN", "MAX"):
            for numel in SIZES if op == "SUM" else (7,):
                x = given(rank, numel, op=op)
                dist.reduce(x, root, op=reduce_op(op))
                if rank == root:
                    expect(x, reduced(world_size, numel, op=op))


def reduce_scatter(rank: int, world_size: int) -> None:
    for op in ("SUM", "AVG", "MAX"):
        for numel in SIZES:
            out = torch.full((numel,), -9.0)
            starts = [100 * r for r in range(world_size)]
            inputs = [given(rank, numel, op=op, start=start) for start in starts]
            dist.reduce_scatter(out, inputs, op=reduce_op(op))
            expect(out, reduced(world_size, numel, op=op, start=100 * rank))
            for start, x in zip(starts, inputs, strict=True):
                expect(x, given(rank, numel, op=op, start=start))


def reduce_scatter_uneven(rank: int, world_size: int) -> None:
    out = torch.full((3 + rank,), -9.0)
    dist.reduce_scatter(out, [given(rank, 3 + r, start=r) for r in range(world_size)])
    expect(out, reduced(world_size, 3 + rank, start=rank))


def reduce_scatter_tensor(rank: int, world_size: int) -> None:
    for op in ("SUM", "AVG", "MIN"):
        for numel in SIZES:
            out = torch.full((numel,), -9.0)
            flat = given(rank, world_size * numel, op=op)
            dist.reduce_scatter_tensor(out, flat, op=reduce_op(op))
            expect(out, reduced(world_size, numel, op=op, start=rank * numel))
            expect(flat, given(rank, world_size * numel, op=op))
    rows = torch.full((2, 3), -9.0)
    dist.reduce_scatter_tensor(rows, given(rank, 6 * world_size).view(2 * world_size, 3))
    expect(rows, reduced(world_size, 6, start=6 * rank).view(2, 3))


def reduce_scatter_in_place(rank: int, world_size: int) -> None:
    """The output is this rank's part of the input."""
    for numel in SIZES:
        flat = given(rank, world_size * numel)
        mine = flat[rank * numel : (rank + 1) * numel]
        dist.reduce_scatter_tensor(mine, flat)
        expect(mine, reduced(world_size, numel, start=rank * numel))


# --- gather, scatter, all_to_all ------------------------------------------------------------------


def gather(rank: int, world_size: int) -> None:
    for root in range(world_size):
        for numel in SIZES:
            outputs = [torch.full((numel,), -9.0) for _ in range(world_size)]
            dist.gather(given(rank, numel), outputs if rank == root else None, dst=root)
            if rank == root:
                for r, x in enumerate(outputs):
                    expect(x, given(r, numel))


def scatter(rank: int, world_size: int) -> None:
    for root in range(world_size):
        for numel in SIZES:
            out = torch.full((numel,), -9.0)
            inputs = [given(root, numel, start=100 * r) for r in range(world_size)]
            dist.scatter(out, inputs if rank == root else None, src=root)
            expect(out, given(root, numel, start=100 * rank))


def all_to_all(rank: int, world_size: int) -> None:
    for numel in SIZES:
        outputs = [torch.full((numel,), -9.0) for _ in range(world_size)]
        dist.all_to_all(outputs, [given(rank, numel, start=100 * r) for r in range(world_size)])
        for r, x in enumerate(outputs):
            expect(x, given(r, numel, start=100 * rank))


def all_to_all_single(rank: int, world_size: int) -> None:
    for numel in SIZES:
        out = torch.full((world_size * numel,), -9.0)
        dist.all_to_all_single(out, given(rank, world_size * numel))
        parts = [given(r, numel, start=rank * numel) for r in range(world_size)]
        expect(out, torch.cat(parts))


def all_to_all_uneven(rank: int, world_size: int) -> None:
    """Rank s sends s + r elements to rank r; rank 0 sends itself none."""
    sends = [rank + r for r in range(world_size)]
    out = torch.full((sum(sends),), -9.0)
    dist.all_to_all_single(out, given(rank, sum(sends)), sends, sends)
    begins = [sum(r + to for to in range(rank)) for r in range(world_size)]
    expect(out, torch.cat([given(r, r + rank, start=begins[r]) for r in range(world_size)]))


# --- point to point -------------------------------------------------------------------------------


def send_and_recv(rank: int, world_size: int) -> None:
    """Round the ring, the lowest rank first."""
    if world_size == 1:
        return
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    for numel in SIZES:
        x = torch.full((numel,), -9.0)
        if rank == 0:
            dist.send(given(rank, numel), after)
            assert dist.recv(x, before) == before
        else:
            assert dist.recv(x, before) == before
            dist.send(given(rank, numel), after)
        expect(x, given(before, numel))


def isend_and_irecv_with_tags(rank: int, world_size: int) -> None:
    """Messages with tags arrive whatever the order in which they are asked for."""
    if world_size == 1:
        return
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    received = [torch.full((9,), -9.0) for _ in range(3)]
    works = [dist.isend(given(rank, 9, start=tag), after, tag=tag) for tag in range(3)]
    works += [dist.irecv(received[tag], before, tag=tag) for tag in (2, 0, 1)]
    for work in works:
        work.wait()
    for tag, x in enumerate(received):
        expect(x, given(before, 9, start=tag))


def recv_from_anyone(rank: int, world_size: int) -> None:
    if rank != 0:
        dist.send(given(rank, 5), 0, tag=11)
        return
    seen = set()
    for _ in range(world_size - 1):
        x = torch.full((5,), -9.0)
        source = dist.recv(x, tag=11)
        expect(x, given(source, 5))
        seen.add(source)
    assert seen == set(range(1, world_size))


def batch_isend_irecv(rank: int, world_size: int) -> None:
    if world_size == 1:
        return
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    x = torch.full((7,), -9.0)
    ops = [dist.P2POp(dist.isend, given(rank, 7), after), dist.P2POp(dist.irecv, x, before)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    expect(x, given(before, 7))


# --- barriers -------------------------------------------------------------------------------------


def barrier(rank: int, world_size: int) -> None:
    """Nobody leaves before the last has come: its file is there."""
    for turn in range(2 * world_size):
        here = scratch_folder() / f"barrier-{turn}"
        if rank == turn % world_size:
            here.touch()
        dist.barrier()
        assert here.exists(), turn


def monitored_barrier(rank: int, world_size: int) -> None:
    # The method, because the function of that name knows gloo alone, by its name.
    group = dist.group.WORLD
    group.monitored_barrier(timedelta(seconds=20), wait_all_ranks=False)
    group.monitored_barrier(timedelta(seconds=20), wait_all_ranks=True)


# --- several tensors in one call ------------------------------------------------------------------


def all_reduce_coalesced(rank: int, world_size: int) -> None:
    for op in ("SUM", "AVG", "MAX"):
        sizes = (3, 1, 1023, 40_000)
        tensors = [given(rank, n, op=op, start=i) for i, n in enumerate(sizes)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            dist.all_reduce_coalesced(tensors, op=reduce_op(op))
        for i, n in enumerate(sizes):
            expect(tensors[i], reduced(world_size, n, op=op, start=i))


def coalescing_manager(rank: int, world_size: int) -> None:
    for async_ops in (False, True):
        sizes = (3, 1023, 40_000)
        sums = [given(rank, n, start=i) for i, n in enumerate(sizes)]
        with dist._coalescing_manager(async_ops=async_ops) as manager:
            for x in sums:
                dist.all_reduce(x)
        if async_ops:
            manager.wait()
        for i, n in enumerate(sizes):
            expect(sums[i], reduced(world_size, n, start=i))
        gathered = [torch.full((world_size * n,), -9.0) for n in sizes]
        with dist._coalescing_manager(async_ops=async_ops) as manager:
            for n, x in zip(sizes, gathered, strict=True):
                dist.all_gather_into_tensor(x, given(rank, n))
        if async_ops:
            manager.wait()
        for n, x in zip(sizes, gathered, strict=True):
            expect(x, torch.cat([given(r, n) for r in range(world_size)]))
        scattered = [torch.full((n,), -9.0) for n in sizes]
        with dist._coalescing_manager(async_ops=async_ops) as manager:
            for n, x in zip(sizes, scattered, strict=True):
                dist.reduce_scatter_tensor(x, given(rank, world_size * n))
        if async_ops:
            manager.wait()
        for n, x in zip(sizes, scattered, strict=True):
            expect(x, reduced(world_size, n, start=rank * n))


# --- objects, sparse tensors ----------------------------------------------------------------------


def object_collectives(rank: int, world_size: int) -> None:
    mine = {"rank": rank, "text": "x" * (1000 * rank)}
    everyone = [{"rank": r, "text": "x" * (1000 * r)} for r in range(world_size)]
    gathered = [None] * world_size
    dist.all_gather_object(gathered, mine)
    assert gathered == everyone
    for root in range(world_size):
        listed = [mine, rank] if rank == root else [None, None]
        dist.broadcast_object_list(listed, src=root)
        assert listed == [everyone[root], root]
        gathered = [None] * world_size
        dist.gather_object(mine, gathered if rank == root else None, dst=root)
        assert gathered == (everyone if rank == root else [None] * world_size)
        out: list[object] = [None]
        dist.scatter_object_list(out, everyone if rank == root else None, src=root)
        assert out == [mine]
    if world_size > 1 and rank < 2:
        listed = [mine] if rank == 0 else [None]
        if rank == 0:
            dist.send_object_list(listed, 1)
        else:
            dist.recv_object_list(listed, 0)
        assert listed == [everyone[0]]


def sparse_all_reduce(rank: int, world_size: int) -> None:
    """Rows overlap in part; one rank has none of its own."""
    for dtype in (torch.float32, torch.float64):
        rows = [0, rank] if rank else []
        index = torch.tensor([rows], dtype=torch.int64)
        values = torch.ones(len(rows), 3, dtype=dtype) * (rank + 1)
        x = torch.sparse_coo_tensor(index, values, (world_size + 2, 3), check_invariants=True)
        dist.all_reduce(x)
        expected = torch.zeros(world_size + 2, 3, dtype=dtype)
        for r in range(1, world_size):
            expected[0] += r + 1
            expected[r] += r + 1
        expect(x.to_dense(), expected)


# --- functional collectives -----------------------------------------------------------------------


def functional_collectives(rank: int, world_size: int) -> None:
    group = list(range(world_size))
    x = given(rank, 6 * world_size)
    expect(functional.all_reduce(x, "sum", group) + 0, reduced(world_size, 6 * world_size))
    averages = given(rank, 6, op="AVG")
    expect(functional.all_reduce(averages, "avg", group) + 0, reduced(world_size, 6, op="AVG"))
    expect(functional.broadcast(x, world_size - 1, group) + 0, given(world_size - 1, len(x)))
    both = functional.all_reduce_coalesced([x, x[:3]], "sum", group)
    expect(both[0] + 0, reduced(world_size, 6 * world_size))
    expect(both[1] + 0, reduced(world_size, 3))
    matrix = given(rank, 6).view(2, 3)
    matrices = [given(r, 6).view(2, 3) for r in group]
    for dim in (0, 1):
        gathered = functional.all_gather_tensor(matrix, dim, group)
        expect(gathered + 0, torch.cat(matrices, dim))
    several = functional.all_gather_into_tensor_coalesced([matrix, matrix[0]], group)
    expect(several[0] + 0, torch.cat(matrices))
    expect(several[1] + 0, torch.cat([m[0] for m in matrices]))
    scattered = functional.reduce_scatter_tensor(x, "sum", 0, group)
    expect(scattered + 0, reduced(world_size, 6, start=6 * rank))
    (scattered,) = functional.reduce_scatter_tensor_coalesced([x], "sum", [0], group)
    expect(scattered + 0, reduced(world_size, 6, start=6 * rank))
    swapped = functional.all_to_all_single(x, [6] * world_size, [6] * world_size, group)
    expect(swapped + 0, torch.cat([given(r, 6, start=6 * rank) for r in group]))
    expect(x, given(rank, 6 * world_size))


# --- the tests ------------------------------------------------------------------------------------

GROUPS = {
    "spreading": [
        broadcast,
        broadcast_coalesced,
        all_gather,
        all_gather_into_tensor,
        all_gather_in_place,
        all_gather_of_strided_tensors,
        all_gather_coalesced,
    ],
    "reducing": [
        reduce,
        reduce_scatter,
        reduce_scatter_uneven,
        reduce_scatter_tensor,
        reduce_scatter_in_place,
        all_reduce_coalesced,
        sparse_all_reduce,
    ],
    "exchanging": [gather, scatter, all_to_all, all_to_all_single, all_to_all_uneven],
    "point to point": [
        send_and_recv,
        isend_and_irecv_with_tags,
        recv_from_anyone,
        batch_isend_irecv,
    ],
    "the rest": [
        barrier,
        monitored_barrier,
        coalescing_manager,
        object_collectives,
        functional_collectives,
    ],
}


@WORLD_SIZES
@pytest.mark.parametrize("cases", GROUPS)
def test_collectives(backend, cases, world_size):
    run_group(_run_all, world_size, backend, GROUPS[cases])


def test_more_ranks_than_cores(backend):
    run_group(_run_all, 8, backend, [check for cases in GROUPS.values() for check in cases])


def _dtypes(rank: int, world_size: int, backend: str) -> None:
    for dtype in DTYPES:
        mine, flat = given(rank, 9, dtype), torch.empty(9 * world_size, dtype=dtype)
        everyones = torch.cat([given(r, 9, dtype) for r in range(world_size)])
        with case(f"broadcast of {dtype}"):
            x = mine.clone()
            dist.broadcast(x, 1)
            expect(x, given(1, 9, dtype))
        with case(f"all_gather of {dtype}"):
            dist.all_gather_into_tensor(flat, mine)
            expect(flat, everyones)
            outputs = [torch.empty_like(mine) for _ in range(world_size)]
            dist.all_gather(outputs, mine)
            expect(torch.cat(outputs), everyones)
        with case(f"scatter of {dtype}"):
            x = torch.empty_like(mine)
            dist.scatter(x, list(everyones.view(-1, 9)) if rank == 0 else None)
            expect(x, mine)
        with case(f"all_to_all of {dtype}"):
            dist.all_to_all_single(flat, mine.repeat(world_size))
            expect(flat, everyones)
        if not (dtype.is_complex and backend == "gloo"):  # Invalid scalar type
            with case(f"gather of {dtype}"):
                outputs = [torch.empty_like(mine) for _ in range(world_size)]
                dist.gather(mine, outputs if rank == 0 else None)
                if rank == 0:
                    expect(torch.cat(outputs), everyones)
        for op in ("SUM", "MAX", "AVG", "BOR"):
            if is_refused(dtype, op):
                continue
            with case(f"reduce and reduce_scatter, {op} of {dtype}"):
                x = given(rank, 9, dtype, op)
                dist.reduce(x, 1, op=reduce_op(op))
                if rank == 1:
                    expect(x, reduced(world_size, 9, dtype, op))
                x = torch.empty(9, dtype=dtype)
                dist.reduce_scatter_tensor(
                    x, given(rank, 9 * world_size, dtype, op), op=reduce_op(op)
                )
                expect(x, reduced(world_size, 9, dtype, op, start=9 * rank))


def test_dtypes(backend):
    run_group(_dtypes, 2, backend, backend)


def _moved_or_refused(rank: int, world_size: int) -> None:
    for dtype in (torch.int16, torch.uint16, torch.float8_e4m3fn):
        mine = torch.arange(12, dtype=torch.uint8)[: 6 * dtype.itemsize].view(dtype)
        with case(f"broadcast of {dtype}"):
            x = mine.clone() if rank == 1 else torch.zeros(6).to(dtype)
            try:
                dist.broadcast(x, 1)
            except (RuntimeError, ValueError, TypeError):
                continue
            expect(x.view(torch.uint8), mine.view(torch.uint8))


def test_other_dtypes_are_moved_or_refused(backend):
    run_group(_moved_or_refused, 2, backend)


def _memory(rank: int, world_size: int, backend: str) -> None:
    """The collectives that reduce or copy between ranks, in each kind of memory, at odd offsets."""
    everyone = range(world_size)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for kind in kinds_of_memory(backend):
            for offset in (1, 64):
                for numel in (1, 1023, 3 * ((128 << 10) // dtype.itemsize) + 1):
                    with case(f"{numel} x {dtype}, {kind}, {offset} elements into its memory"):
                        x = operand(kind, given(rank, numel, dtype), offset)
                        dist.broadcast(x.tensor, 1)
                        expect(x.tensor, given(1, numel, dtype))
                        x.check_guards()
                        x = operand(kind, given(rank, numel, dtype), offset)
                        out = operand(kind, torch.zeros(world_size * numel, dtype=dtype), offset)
                        dist.all_gather_into_tensor(out.tensor, x.tensor)
                        expect(out.tensor, torch.cat([given(r, numel, dtype) for r in everyone]))
                        out.check_guards()
                        x = operand(kind, given(rank, world_size * numel, dtype), offset)
                        out = operand(kind, torch.zeros(numel, dtype=dtype), offset)
                        dist.reduce_scatter_tensor(out.tensor, x.tensor)
                        expect(out.tensor, reduced(world_size, numel, dtype, start=rank * numel))
                        expect(x.tensor, given(rank, world_size * numel, dtype))
                        out.check_guards()


@pytest.mark.parametrize("world_size", [2, 3])
def test_kinds_of_memory(backend, world_size):
    run_group(_memory, world_size, backend, backend)


def _lengths(rank: int, world_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for numel in lengths(dtype):
            with case(f"{numel} x {dtype}"):
                x = given(rank, numel, dtype)
                dist.broadcast(x, 1)
                expect(x, given(1, numel, dtype))
                out = torch.empty(world_size * numel, dtype=dtype)
                dist.all_gather_into_tensor(out, given(rank, numel, dtype))
                expect(out, torch.cat([given(r, numel, dtype) for r in range(world_size)]))
                x = torch.empty(numel, dtype=dtype)
                dist.reduce_scatter_tensor(x, given(rank, world_size * numel, dtype))
                expect(x, reduced(world_size, numel, dtype, start=rank * numel))


@pytest.mark.parametrize("world_size", [2, 3])
def test_lengths(backend, world_size):
    run_group(_lengths, world_size, backend)
