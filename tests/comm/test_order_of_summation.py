"""The order of summation is fixed: all ranks and all runs get the same bits.

On gloo every rank gets the same, in whatever order. On the others a sum begins with rank 0 and ends
with the last rank; float16 and bfloat16 are accumulated in float32 and rounded once.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import FLOATS, case, kinds_of_memory, not_gloo, operand, reduce_op, run_group
from tests.slow import slow_but_for

SIZES = (1, 7, 1000, 32_769, 140_001)  # the last: more than all staging slots hold
WORLD_SIZES = pytest.mark.parametrize("world_size", slow_but_for([2, 3], [2, 3, 4, 8]))


# Small: eight ranks hold one each.
@lru_cache(maxsize=32)
def _random(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of such different magnitudes that another order gives other bits.

    Some of an odd rank cancel those of the rank before it; what is added in between shows even in
    the few bits of a bfloat16.
    """
    values = _spread(rank, numel, dtype)
    if rank % 2 == 1:
        some = slice(rank % 3, None, 3)
        values[some] = -_spread(rank - 1, numel, dtype)[some]
    return values


def _spread(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    mantissa = torch.randn(numel, generator=generator, dtype=torch.float64)
    largest = 10 if dtype == torch.float16 else 20  # 8 ranks' sum is finite
    exponent = torch.randint(-largest, largest + 1, (numel,), generator=generator)
    return (mantissa * 2.0**exponent).to(dtype)


@lru_cache(maxsize=4)
def _in_order(
    ranks: range | tuple[int, ...], numel: int, dtype: torch.dtype, op: str
) -> torch.Tensor:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    total = _random(ranks[0], numel, dtype).to(accumulator)
    for rank in ranks[1:]:
        x = _random(rank, numel, dtype).to(accumulator)
        total = total + x if op == "SUM" else total * x
    return total.to(dtype)


def _bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _expect_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if _bits(actual) == _bits(expected):
        return
    wrong = (actual != expected).nonzero().flatten()
    at = int(wrong[0]) if len(wrong) else -1
    raise AssertionError(
        f"{len(wrong)} of {actual.numel()} elements have other bits, the first at {at}: "
        f"{actual[at].item()!r} instead of {expected[at].item()!r}"
    )


def test_another_order_or_precision_would_show():
    for dtype in FLOATS:
        in_order = _in_order(range(4), 1000, dtype, "SUM")
        for other in ((3, 2, 1, 0), (1, 2, 3, 0)):
            assert _bits(in_order) != _bits(_in_order(other, 1000, dtype, "SUM")), (dtype, other)
    for dtype in (torch.float16, torch.bfloat16):
        rounded_each_time = sum(_random(rank, 1000, dtype) for rank in range(4))
        assert _bits(rounded_each_time) != _bits(_in_order(range(4), 1000, dtype, "SUM")), dtype


def _results(rank: int, world_size: int, backend: str) -> str:
    """Digest what random data is reduced to; the ways through memory may not differ."""
    digest = hashlib.sha256()
    for dtype in FLOATS:
        for op in ("SUM", "AVG", "PRODUCT"):
            for numel in SIZES if op == "SUM" else SIZES[:-1]:
                results = []
                for kind in kinds_of_memory(backend):
                    x = operand(kind, _random(rank, numel, dtype))
                    dist.all_reduce(x.tensor, op=reduce_op(op))
                    results.append(_bits(x.tensor))
                with case(f"{op} of {numel} x {dtype} in {kinds_of_memory(backend)}"):
                    assert len(set(results)) == 1
                digest.update(results[0])
    return digest.hexdigest()


@WORLD_SIZES
def test_the_same_bits_on_all_ranks_and_in_two_runs(backend, world_size):
    digests = [run_group(_results, world_size, backend, backend) for _ in range(2)]
    assert len(set(digests[0] + digests[1])) == 1, digests


def _order(rank: int, world_size: int, backend: str) -> None:
    for dtype in FLOATS:
        for numel in SIZES:
            for kind in kinds_of_memory(backend):
                for op in ("SUM", "PRODUCT"):
                    for offset in (1, 64):
                        with case(f"{op} of {numel} x {dtype}, {kind}, offset {offset}"):
                            x = operand(kind, _random(rank, numel, dtype), offset)
                            dist.all_reduce(x.tensor, op=reduce_op(op))
                            _expect_bits(x.tensor, _in_order(range(world_size), numel, dtype, op))
                if numel == SIZES[-1]:
                    continue
                with case(f"reduce_scatter of {numel} x {dtype}, {kind}"):
                    flat = operand(kind, _random(rank, numel * world_size, dtype))
                    out = operand(kind, torch.empty(numel, dtype=dtype))
                    dist.reduce_scatter_tensor(out.tensor, flat.tensor)
                    total = _in_order(range(world_size), numel * world_size, dtype, "SUM")
                    _expect_bits(out.tensor, total[rank * numel : (rank + 1) * numel])


@not_gloo  # whose order depends on the element's place
@WORLD_SIZES
def test_sums_go_from_the_first_rank_to_the_last(backend, world_size):
    run_group(_order, world_size, backend, backend)


def _other_forms(rank: int, world_size: int) -> None:
    """Coalesced, asynchronous, in a sub-group: the same order."""
    expected = {n: _in_order(range(world_size), n, torch.float32, "SUM") for n in SIZES}
    tensors = {n: _random(rank, n, torch.float32).clone() for n in SIZES}
    dist.all_reduce_coalesced(list(tensors.values()))
    for numel, x in tensors.items():
        with case(f"coalesced, {numel}"):
            _expect_bits(x, expected[numel])
    tensors = {n: _random(rank, n, torch.float32).clone() for n in SIZES}
    works = [dist.all_reduce(x, async_op=True) for x in tensors.values()]
    for work in works:
        work.wait()
    for numel, x in tensors.items():
        with case(f"async, {numel}"):
            _expect_bits(x, expected[numel])
    members = (1, 2, 3)
    group = dist.new_group(list(members))
    if rank in members:
        for numel in SIZES:
            with case(f"sub-group, {numel}"):
                x = _random(rank, numel, torch.float32).clone()
                dist.all_reduce(x, group=group)
                _expect_bits(x, _in_order(members, numel, torch.float32, "SUM"))


@not_gloo
def test_the_order_is_the_same_in_all_forms(backend):
    run_group(_other_forms, 4, backend)
