"""all_reduce: every operation, dtype, length, number of ranks and kind of memory."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import (
    BACKENDS,
    DTYPES,
    OPS,
    SHORT_LENGTHS,
    case,
    expect,
    given,
    is_refused,
    kinds_of_memory,
    lengths,
    not_gloo,
    operand,
    reduce_op,
    reduced,
    run_group,
)
from tests.slow import slow_but_for


def test_every_backend_that_is_registered_is_tested():
    ours = {"shm"} & set(dist.Backend.backend_list)
    assert ours <= set(BACKENDS), "add it to BACKENDS in tests/comm/common.py"


def _check(kind: str, numel: int, dtype: torch.dtype, op: str, offset: int = 64) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with case(f"{op} of {numel} x {dtype}, {kind}, {offset} elements into its memory"):
        x = operand(kind, given(rank, numel, dtype, op), offset)
        dist.all_reduce(x.tensor, op=reduce_op(op))
        expect(x.tensor, reduced(world_size, numel, dtype, op))
        x.check_guards()


def _operations(rank: int, world_size: int, backend: str) -> None:
    for dtype in DTYPES:
        for op in OPS:
            if not is_refused(dtype, op):
                for kind in kinds_of_memory(backend):
                    for numel in SHORT_LENGTHS:
                        _check(kind, numel, dtype, op)


@pytest.mark.parametrize("world_size", slow_but_for([1, 2, 3], [1, 2, 3, 4, 8]))
def test_operations(backend, world_size):
    run_group(_operations, world_size, backend, backend)


def _lengths(rank: int, world_size: int, backend: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        for op in OPS:
            # The loop over elements differs by operation, the way through memory only by size.
            if is_refused(dtype, op):
                continue
            for numel in lengths(dtype):
                _check("ordinary", numel, dtype, op)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in kinds_of_memory(backend)[1:]:
            for numel in lengths(dtype):
                _check(kind, numel, dtype, "SUM")


# By size of an element, so that none of these tests is long.
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_lengths(backend, itemsize):
    run_group(_lengths, 2, backend, backend, [d for d in DTYPES if d.itemsize == itemsize])


def _lengths_of_sums(rank: int, world_size: int, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in kinds_of_memory(backend):
            for numel in lengths(dtype):
                _check(kind, numel, dtype, "SUM")


@pytest.mark.parametrize("world_size", slow_but_for([1, 3], [1, 3, 4, 8]))
def test_lengths_on_other_numbers_of_ranks(backend, world_size):
    run_group(_lengths_of_sums, world_size, backend, backend)


def _offsets(rank: int, world_size: int, backend: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.uint8, torch.float64):
        for kind in kinds_of_memory(backend):
            for offset in (1, 2, 3, 5, 1021):
                for numel in (1, 1023, (128 << 10) // dtype.itemsize + 1):
                    _check(kind, numel, dtype, "SUM", offset)
                    # Ranks need not agree on where their tensors lie.
                    _check(kind, numel, dtype, "SUM", offset + rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_views_at_odd_offsets(backend, world_size):
    run_group(_offsets, world_size, backend, backend)


HUNDRED_MB = 25 * 10**6  # float32


def _hundred_mb(rank: int, world_size: int, backend: str) -> None:
    for kind in kinds_of_memory(backend):
        _check(kind, HUNDRED_MB, torch.float32, "SUM")


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 4]))
def test_a_hundred_mb(backend, world_size):
    run_group(_hundred_mb, world_size, backend, backend)


def _refusals(rank: int, world_size: int) -> None:
    for dtype in DTYPES:
        for op in OPS:
            if is_refused(dtype, op):
                with case(f"{op} of {dtype}"), pytest.raises((RuntimeError, ValueError)):
                    dist.all_reduce(given(rank, 3, dtype), op=reduce_op(op))
                # The group still works.
                _check("ordinary", 3, torch.float32, "SUM")


def test_what_is_refused_leaves_the_group_working(backend):
    run_group(_refusals, 2, backend)


def _uncommon(rank: int, world_size: int) -> None:
    for dtype in (torch.int16, torch.uint16, torch.uint32):
        with case(str(dtype)):
            x = given(rank, 7, dtype).clone()
            try:
                dist.all_reduce(x)
            except (RuntimeError, ValueError, TypeError):
                expect(x, given(rank, 7, dtype))
            else:
                expect(x, reduced(world_size, 7, dtype))
        _check("ordinary", 3, torch.float32, "SUM")


def test_other_dtypes_are_reduced_or_refused(backend):
    run_group(_uncommon, 2, backend)


def _shapes(rank: int, world_size: int) -> None:
    for shape in ((), (1,), (3, 5), (2, 3, 4), (0, 3), (1, 1, 1, 7)):
        numel = int(torch.tensor(shape).prod())
        with case(f"shape {shape}"):
            x = given(rank, numel).view(shape).clone()
            dist.all_reduce(x)
            expect(x, reduced(world_size, numel).view(shape))


def test_shapes(backend):
    run_group(_shapes, 2, backend)


def _dense(rank: int, world_size: int) -> None:
    """Dense tensors whose elements lie in another order than their indices."""
    numel = 2 * 3 * 4 * 5
    layouts = {
        "transposed": lambda x: x.view(10, 12).t(),
        "channels last": lambda x: x.view(2, 4, 5, 3).permute(0, 3, 1, 2),
        "permuted": lambda x: x.view(2, 3, 20).permute(2, 0, 1),
    }
    for name, layout in layouts.items():
        with case(name):
            base = given(rank, numel).clone()
            dist.all_reduce(layout(base))
            expect(base, reduced(world_size, numel))


def test_dense_tensors_in_another_order(backend):
    run_group(_dense, 2, backend)


_WITH_HOLES = {
    "every other element": lambda x: x[::2],
    "columns": lambda x: x.view(3, 40)[:, 10:31],
    "transposed columns": lambda x: x.view(3, 40)[:, 10:31].t(),
}


def _holes_coalesced(rank: int, world_size: int) -> None:
    for name, view in _WITH_HOLES.items():
        with case(name):
            base, expected = given(rank, 120).clone(), given(rank, 120).clone()
            view(expected).copy_(view(reduced(world_size, 120)))
            dist.all_reduce_coalesced([view(base)])
            expect(base, expected)


def test_tensors_with_holes_coalesced(backend):
    run_group(_holes_coalesced, 2, backend)


def _holes(rank: int, world_size: int) -> None:
    collectives = {
        "all_reduce": (dist.all_reduce, reduced(world_size, 120)),
        "broadcast": (lambda t: dist.broadcast(t, 1), given(1, 120)),
    }
    for name, view in _WITH_HOLES.items():
        for what, (collective, result) in collectives.items():
            with case(f"{what}, {name}"):
                base, expected = given(rank, 120).clone(), given(rank, 120).clone()
                try:
                    collective(view(base))
                except (RuntimeError, ValueError) as error:
                    refusal = str(error)
                else:
                    refusal = None
                    view(expected).copy_(view(result))
                expect(base, expected)
                assert refusal is None or re.search("contiguous|dense", refusal), refusal
    with case("expanded"):
        base = given(rank, 4).clone()
        with pytest.raises((RuntimeError, ValueError), match=r"contiguous|overlap|memory location"):
            dist.all_reduce(base[:1].expand(3))
        expect(base, given(rank, 4))


@not_gloo  # which takes the memory for dense: it reduces what lies between, or beyond the end
def test_tensors_with_holes_are_reduced_or_refused(backend):
    run_group(_holes, 2, backend)


def _bools(rank: int, world_size: int) -> None:
    for op in ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"):
        with case(op):
            x = torch.ones(9, dtype=torch.bool)
            dist.all_reduce(x, op=reduce_op(op))
            bits = x.view(torch.uint8).tolist()
            assert bits == [0 if op == "BXOR" else 1] * 9, bits


@not_gloo  # which adds bytes: the sum of True and True is a bool that is 2
def test_a_bool_is_zero_or_one(backend):
    run_group(_bools, 2, backend)


def _special_values(rank: int, world_size: int) -> None:
    """NaN on one rank is NaN for all, whatever its payload; sums overflow to infinity."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        # Rounding that adds before it truncates carries the last of these over into -0.
        all_ones = torch.tensor([-1], dtype=bits).view(dtype)
        largest = torch.finfo(dtype).max
        tiny = torch.finfo(dtype).smallest_normal / 4
        with case(str(dtype)):
            mine = torch.tensor([float("nan"), float("inf"), largest, tiny, -0.0, 1.0], dtype=dtype)
            others = torch.tensor([1.0, 1.0, largest, tiny, -0.0, 1.0], dtype=dtype)
            x = torch.cat([mine, all_ones] if rank == 0 else [others, torch.ones_like(all_ones)])
            x = x.repeat(9)  # through the vectorised loop and its tail
            dist.all_reduce(x)
            for at in range(9):
                nan, inf, overflow, small, zero, two, also_nan = x[7 * at : 7 * at + 7].tolist()
                assert nan != nan, nan
                assert also_nan != also_nan, also_nan
                assert inf == overflow == float("inf"), (inf, overflow)
                assert small == 2 * float(torch.tensor(tiny, dtype=dtype)), small
                assert (zero, two) == (0.0, 2.0)


def test_special_values(backend):
    run_group(_special_values, 2, backend)


def _nan_by_min_and_max(rank: int, world_size: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for op in ("MIN", "MAX"):
            for who in range(world_size):
                with case(f"{op} of {dtype}, NaN on rank {who}"):
                    x = torch.full((37,), float("nan") if rank == who else 1.0, dtype=dtype)
                    dist.all_reduce(x, op=reduce_op(op))
                    values = [torch.empty_like(x) for _ in range(world_size)]
                    dist.all_gather(values, x)
                    same = {v.view(torch.uint8).numpy().tobytes() for v in values}
                    assert len(same) == 1, [v[0].item() for v in values]


def test_a_nan_is_treated_alike_on_all_ranks_by_min_and_max(backend):
    run_group(_nan_by_min_and_max, 3, backend)
