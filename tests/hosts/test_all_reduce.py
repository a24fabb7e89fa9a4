"""all_reduce of ranks on several hosts: reduced within each, between them, and spread."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from tests.hosts.common import allocate, backend_of, case, given, reduced, run_on_hosts
from tests.slow import slow_but_for

# Equal and unequal numbers of ranks; hosts whose ranks follow one another and whose do not.
LAYOUTS = ("aabb", "abbb", "aab", "aabc", "abab", "abba")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
PIECE_BYTES = 2 << 20


def _tensor(value: torch.Tensor, own: bool) -> torch.Tensor:
    if not own:
        return value.clone()
    tensor = allocate(value.numel(), value.dtype)
    return tensor.copy_(value)


def _ops_and_dtypes(rank: int, world_size: int) -> list[str]:
    assert backend_of().spans_hosts
    gloo = dist.new_group(backend="gloo")
    ranks = list(range(world_size))
    refused = []
    for dtype in (*FLOATS, *INTEGERS):
        for name in OPS:
            op = getattr(dist.ReduceOp, name)
            try:
                dist.all_reduce(given(rank, 3, dtype, name), op, gloo)
            except RuntimeError as error:
                refused.append(f"{dtype} {name}")
                with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0])):
                    dist.all_reduce(given(rank, 3, dtype, name), op)
                continue
            for numel in (0, 1, 7, 1023):
                for own in (False, True, rank % 2 == 0):
                    with case(f"{name} of {numel} x {dtype}, {own=}"):
                        tensor = _tensor(given(rank, numel, dtype, name), own)
                        dist.all_reduce(tensor, op)
                        assert torch.equal(tensor, reduced(ranks, numel, dtype, name))
    return refused


@pytest.mark.parametrize("hosts", slow_but_for(["aab"], LAYOUTS))
def test_operations_of_all_dtypes(hosts):
    refused = run_on_hosts(_ops_and_dtypes, hosts)[0]
    assert "torch.float32 BAND" in refused
    assert not {f"torch.float32 {op}" for op in ("SUM", "AVG", "MAX")} & set(refused)


def _lengths(rank: int, world_size: int) -> None:
    ranks = list(range(world_size))
    for dtype in (torch.float32, torch.uint8):
        piece = PIECE_BYTES // dtype.itemsize
        for numel in (piece - 1, piece, piece + 1, 3 * piece + 1, 4 * piece + 17):
            expected = reduced(ranks, numel, dtype)
            for own in (False, True, rank % 2 == 0, rank == 0):
                with case(f"{numel} x {dtype}, {own=}"):
                    tensor = _tensor(given(rank, numel, dtype), own)
                    dist.all_reduce(tensor)
                    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("hosts", slow_but_for(["aab", "abba"], LAYOUTS))
def test_lengths_around_pieces_in_all_kinds_of_memory(hosts):
    run_on_hosts(_lengths, hosts)


def _views(rank: int, world_size: int) -> None:
    ranks = list(range(world_size))
    around = allocate(1000, torch.float32).fill_(-1)
    around[3:990] = given(rank, 987)
    dist.all_reduce(around[3:990])
    assert torch.equal(around[3:990], reduced(ranks, 987))
    assert (torch.cat([around[:3], around[990:]]) == -1).all()
    columns = given(rank, 100 * 30).view(100, 30).t()
    dist.all_reduce(columns)
    assert torch.equal(columns, reduced(ranks, 3000).view(100, 30).t())
    pairs = torch.complex(given(rank, 500), given(rank + 1, 500))
    dist.all_reduce(pairs)
    expected = torch.complex(reduced(ranks, 500), reduced([r + 1 for r in ranks], 500))
    assert torch.equal(pairs, expected)


def test_views_and_complex_numbers():
    run_on_hosts(_views, "aab")


def _async(rank: int, world_size: int) -> None:
    ranks = list(range(world_size))
    numels = [1, 5_000, 1_500_000, 0, 777]
    tensors = [
        _tensor(given(rank, numel), own=index % 2 == rank % 2) for index, numel in enumerate(numels)
    ]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    future = works[2].get_future()
    between = torch.full((3,), float(rank))
    dist.broadcast(between, 1)  # which gloo does
    assert torch.equal(future.wait()[0], reduced(ranks, numels[2]))
    for work in reversed(works):
        work.wait()
    for tensor, numel in zip(tensors, numels, strict=True):
        assert torch.equal(tensor, reduced(ranks, numel))
    assert between.tolist() == [1.0] * 3
    coalesced = [given(rank, numel) for numel in numels]
    dist.group.WORLD.allreduce_coalesced(coalesced).wait()
    for tensor, numel in zip(coalesced, numels, strict=True):
        assert torch.equal(tensor, reduced(ranks, numel))


@pytest.mark.parametrize("hosts", ["aabb", "baab"])
def test_async_works_and_coalesced_ones(hosts):
    run_on_hosts(_async, hosts)


def _bits(rank: int, world_size: int, dtype: torch.dtype) -> bytes:
    torch.manual_seed(rank)
    tensor = torch.randn(600_001).to(dtype)
    results = []
    for own in (False, True, rank % 2 == 0):
        copy = _tensor(tensor, own)
        dist.all_reduce(copy, dist.ReduceOp.AVG)
        results.append(copy.view(torch.uint8).numpy().tobytes())
    assert len(set(results)) == 1
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hosts", ["abab", "aabc"])
def test_all_ranks_and_kinds_of_memory_give_the_same_bits(hosts, dtype):
    assert len(set(run_on_hosts(_bits, hosts, dtype))) == 1
