"""A long random sequence of small collectives, every result checked.

FASTDDP_SOAK sets the number of collectives; a failure prints the seed and the place in it.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import allocate, case, expect, run_group

COUNT = int(os.environ.get("FASTDDP_SOAK", "20000"))
# Of gloo's, which is to show only that the sequence is right.
GLOO_SHARE = 10
TIMEOUT_S = 50.0 + COUNT / 200

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64)
KINDS = {  # weights
    "all_reduce": 10,
    "broadcast": 4,
    "all_gather_into_tensor": 4,
    "reduce_scatter_tensor": 4,
    "barrier": 2,
    "all_gather": 1,
    "reduce": 1,
    "gather": 1,
    "scatter": 1,
    "all_to_all_single": 1,
    "ring": 1,
}
LONG = 1 << 18  # elements, once in a while
PERIOD = 4099


class Step(NamedTuple):
    """One collective, the same on all ranks but for what depends on the rank."""

    kind: str
    numel: int
    dtype: torch.dtype
    op: str
    root: int
    start: int
    group: int
    is_async: bool
    own_memory: int  # bit r: rank r's tensors are of the backend's own


def _steps(seed: int, count: int, world_size: int) -> Iterator[Step]:
    choose = random.Random(seed)
    kinds, weights = zip(*KINDS.items(), strict=True)
    for _ in range(count):
        numel = choose.choice((0, 1, 2, 5, 17, 64, 255, 256, 1000, 1024, 2047))
        if choose.random() < 0.001:
            numel = LONG + choose.randrange(3)
        yield Step(
            kind=choose.choices(kinds, weights)[0],
            numel=numel,
            dtype=choose.choice(DTYPES),
            op=choose.choice(("SUM", "MIN", "MAX")),
            root=choose.randrange(world_size),
            start=choose.randrange(PERIOD),
            group=choose.randrange(2),
            is_async=choose.random() < 0.2,
            own_memory=choose.choice((0, 0, -1, choose.getrandbits(world_size))),
        )


@cache
def _ramp(dtype: torch.dtype) -> torch.Tensor:
    """0 to 4 over and over, with a step at a prime; long enough for any start and number."""
    index = torch.arange(PERIOD + 4 * (LONG + 3))
    return (index % PERIOD % 5).to(dtype)


def _whole(step: Step, rank: int, times: int = 1) -> torch.Tensor:
    """What a rank gives: the ramp plus its number."""
    return _ramp(step.dtype)[step.start : step.start + times * step.numel] + rank


def _reduced(step: Step, world_size: int, times: int = 1) -> torch.Tensor:
    ramp = _ramp(step.dtype)[step.start : step.start + times * step.numel]
    if step.op == "MIN":
        return ramp.clone()
    if step.op == "MAX":
        return ramp + (world_size - 1)
    return ramp * world_size + world_size * (world_size - 1) // 2


def _launch(step: Step, group: dist.ProcessGroup) -> tuple[dist.Work | None, Callable[[], None]]:
    """Begin a collective; return its work and what checks the result."""
    rank, world_size, n = group.rank(), group.size(), step.numel
    op = getattr(dist.ReduceOp, step.op)
    options = {"group": group, "async_op": step.is_async}

    def memory(numel: int) -> torch.Tensor:
        if dist.get_backend(group) != "gloo" and step.own_memory >> rank & 1:
            return allocate(numel, step.dtype, group)
        return torch.empty(numel, dtype=step.dtype)

    def give(times: int = 1) -> torch.Tensor:
        return memory(times * n).copy_(_whole(step, rank, times))

    def parts() -> list[torch.Tensor]:
        return [_whole(step, r) for r in range(world_size)]

    def share(whole: torch.Tensor) -> torch.Tensor:
        return whole[rank * n : (rank + 1) * n]

    if step.kind == "all_reduce":
        x = give()
        work = dist.all_reduce(x, op=op, **options)
        return work, lambda: expect(x, _reduced(step, world_size))
    if step.kind == "broadcast":
        x = give()
        work = dist.broadcast(x, group_src=step.root, **options)
        return work, lambda: expect(x, _whole(step, step.root))
    if step.kind == "all_gather_into_tensor":
        out = memory(world_size * n)
        work = dist.all_gather_into_tensor(out, give(), **options)
        return work, lambda: expect(out, torch.cat(parts()))
    if step.kind == "reduce_scatter_tensor":
        out = memory(n)
        work = dist.reduce_scatter_tensor(out, give(world_size), op=op, **options)
        return work, lambda: expect(out, share(_reduced(step, world_size, world_size)))
    if step.kind == "all_gather":
        outputs = [memory(n) for _ in range(world_size)]
        work = dist.all_gather(outputs, give(), **options)
        return work, lambda: expect(torch.cat(outputs), torch.cat(parts()))
    if step.kind == "reduce":
        x = give()
        work = dist.reduce(x, group_dst=step.root, op=op, **options)
        return work, lambda: rank != step.root or expect(x, _reduced(step, world_size))
    if step.kind == "gather":
        outputs = [memory(n) for _ in range(world_size)] if rank == step.root else None
        work = dist.gather(give(), outputs, group_dst=step.root, **options)
        return work, lambda: outputs is None or expect(torch.cat(outputs), torch.cat(parts()))
    if step.kind == "scatter":
        x = memory(n)
        inputs = parts() if rank == step.root else None
        work = dist.scatter(x, inputs, group_src=step.root, **options)
        return work, lambda: expect(x, _whole(step, rank))
    if step.kind == "all_to_all_single":
        out = memory(world_size * n)
        work = dist.all_to_all_single(out, give(world_size), **options)
        shares = [share(_whole(step, r, world_size)) for r in range(world_size)]
        return work, lambda: expect(out, torch.cat(shares))
    if step.kind == "ring":
        before, after = (rank - 1) % world_size, (rank + 1) % world_size
        x = memory(n)
        sent = dist.isend(give(), group=group, group_dst=after)
        dist.recv(x, group=group, group_src=before)
        sent.wait()
        return None, lambda: expect(x, _whole(step, before))
    assert step.kind == "barrier"
    return dist.barrier(**options), lambda: None


def _soak(rank: int, world_size: int, seed: int, count: int) -> None:
    groups = [dist.new_group(), dist.new_group()]
    in_flight: deque = deque()

    def finish_one() -> None:
        number, step, work, check = in_flight.popleft()
        with case(f"seed {seed}, collective {number}: {step}"):
            work.wait()
            check()

    for number, step in enumerate(_steps(seed, count, world_size)):
        with case(f"seed {seed}, collective {number}: {step}"):
            work, check = _launch(step, groups[step.group])
            if work is None:
                check()
        if work is not None:
            in_flight.append((number, step, work, check))
        while len(in_flight) > 8:
            finish_one()
    while in_flight:
        finish_one()


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize(
    ("world_size", "share"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (3, 4),
        pytest.param(4, 4, marks=pytest.mark.slow),
    ],
)
def test_soak(backend, world_size, share):
    count = COUNT // share // (GLOO_SHARE if backend == "gloo" else 1)
    run_group(_soak, world_size, backend, world_size, count, timeout=TIMEOUT_S)
