"""What the tests of the collectives share: backends, operands, values whose reductions are exact.

Expected values are computed from rank and index alone, never by another collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastddp  # noqa: F401 - its import registers its backends
from tests.ranks import init_group, run_ranks

BACKENDS = ("gloo", "shm")
# For what torch's gloo gets wrong, or answers with less: each use says what.
not_gloo = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "gloo"], indirect=True
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, *COMPLEX)
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")

# Reductions that are an error on every backend, some of them in torch.distributed itself.
_REFUSED = {
    **{(dtype, op): "bits of a float" for dtype in FLOATS for op in ("BAND", "BOR", "BXOR")},
    **{(dtype, "AVG"): "not a whole number" for dtype in (*INTEGERS, torch.bool)},
    **{
        (dtype, op): "no such operation"
        for dtype in COMPLEX
        for op in OPS
        if op not in ("SUM", "AVG")
    },
}


def is_refused(dtype: torch.dtype, op: str) -> bool:
    """Return whether a reduction is an error."""
    return (dtype, op) in _REFUSED


def reduce_op(op: str) -> dist.ReduceOp:
    return getattr(dist.ReduceOp, op)


# --- running --------------------------------------------------------------------------------------


def run_group(
    fn: Callable[..., Any],
    world_size: int,
    backend: str,
    *args: Any,
    group_timeout_s: float | None = None,
    **options: Any,
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on ranks whose default group is of that backend."""
    __tracebackhide__ = True
    call = (fn, backend, args, group_timeout_s)
    return run_ranks(_in_group, world_size, *call, init_group=False, **options)


def _in_group(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    backend: str,
    args: tuple[Any, ...],
    group_timeout_s: float | None,
) -> Any:
    init_group(backend, group_timeout_s)
    return fn(rank, world_size, *args)


@contextlib.contextmanager
def case(name: str) -> Iterator[None]:
    """Name the case in whatever is raised in it; many cases share one start of ranks."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"case {name}: {type(error).__name__}: {error}") from error


def expect(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare exactly, and say where and what the first difference is."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if torch.equal(actual, expected):
        return
    wrong = (actual != expected).flatten().nonzero().flatten()
    at = int(wrong[0])
    raise AssertionError(
        f"{len(wrong)} of {actual.numel()} elements are wrong, the first at {at}: "
        f"{actual.flatten()[at].item()} instead of {expected.flatten()[at].item()}"
    )


# --- values ---------------------------------------------------------------------------------------

# Of a pattern that repeats. Prime, so that whatever is displaced by a slot, a page or a rank's
# share shows.
PERIOD = 4099


@cache
def _pattern(rank: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    """Return what a rank gives, shape (PERIOD,), small enough for exact results in any dtype."""
    index = torch.arange(PERIOD)
    mixed = (index * index * (2 * rank + 3) + 31 * index * (rank + 1) + 7 * rank) % 8191 % 97
    if op == "PRODUCT":
        whole = torch.tensor([1, 2, -1, 1])[mixed % 4]  # up to 2**8 on eight ranks
    elif op in ("BAND", "BOR", "BXOR"):
        whole = mixed | (index % 2) * 16  # a bit that all ranks share, so that BAND is not 0
    else:
        whole = mixed % 5 - 2
    if op == "AVG":
        # A multiple of any number of ranks up to 4; 8 divides exactly in a float.
        whole = whole * 12
    if dtype == torch.bool:
        return mixed % 3 == 0
    if dtype.is_complex:
        return torch.complex(whole.double(), (whole.roll(1)).double()).to(dtype)
    return whole.to(dtype)


@cache
def _reduced_pattern(ranks: tuple[int, ...], dtype: torch.dtype, op: str) -> torch.Tensor:
    # Exact in any case: complex128 and int64 hold all of these.
    wide = torch.complex128 if dtype.is_complex else torch.int64
    given = torch.stack([_pattern(rank, dtype, op).to(wide) for rank in ranks])
    if op in ("SUM", "AVG"):
        result = given.sum(0)
    elif op == "PRODUCT":
        result = given.prod(0)
    elif op == "MIN":
        result = given.amin(0)
    elif op == "MAX":
        result = given.amax(0)
    else:
        result = given[0]
        for other in given[1:]:
            combine = {"BAND": torch.bitwise_and, "BOR": torch.bitwise_or}
            result = combine.get(op, torch.bitwise_xor)(result, other)
    if op == "AVG":
        return (
            (result.to(torch.complex128) / len(ranks)).to(dtype)
            if dtype.is_complex
            else (result.double() / len(ranks)).to(dtype)
        )
    return result.to(dtype)  # integers wrap around, as sums in their own type do


def _repeat(pattern: torch.Tensor, numel: int, start: int = 0) -> torch.Tensor:
    times = (start + numel + PERIOD - 1) // PERIOD
    return pattern.repeat(times)[start : start + numel]


def given(
    rank: int, numel: int, dtype: torch.dtype = torch.float32, op: str = "SUM", start: int = 0
) -> torch.Tensor:
    """Return elements start..start + numel of what a rank gives to a collective."""
    return _repeat(_pattern(rank, dtype, op), numel, start)


def reduced(
    ranks: int | range | list[int],
    numel: int,
    dtype: torch.dtype = torch.float32,
    op: str = "SUM",
    start: int = 0,
) -> torch.Tensor:
    """Return the reduction of what these ranks (or that many) give, computed from the formula."""
    group = tuple(range(ranks)) if isinstance(ranks, int) else tuple(ranks)
    return _repeat(_reduced_pattern(group, dtype, op), numel, start)


def lengths(dtype: torch.dtype) -> list[int]:
    """Return numbers of elements at which an implementation may go another way.

    None, one, odd, around powers of two of bytes where staging slots may end, beyond a MiB.
    """
    edges = [(kib << 10) // dtype.itemsize + d for kib in (64, 128, 256) for d in (-1, 0, 1)]
    return [0, 1, 3, 7, 1023, 4096, *edges, (1 << 20) // dtype.itemsize + 1]


SHORT_LENGTHS = (0, 1, 7, 1023)

# --- operands -------------------------------------------------------------------------------------

_GUARD = 5  # elements on either side that no collective may touch


@dataclass(frozen=True)
class Operand:
    """A tensor between guards, in memory of one kind."""

    tensor: torch.Tensor
    around: torch.Tensor
    begin: int

    def check_guards(self) -> None:
        end = self.begin + self.tensor.numel()
        for what, guard in (("before", self.around[: self.begin]), ("after", self.around[end:])):
            assert bool((guard == 1).all()), f"elements {what} the tensor were overwritten: {guard}"


def allocate(
    numel: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return memory of the backend's own, in which collectives need no copies."""
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    return backend.allocate_tensor(numel, dtype=dtype, device=torch.device("cpu"))


# Kind of memory -> whether a rank's tensor is of the backend's own.
_OWN_MEMORY: dict[str, Callable[[int], bool]] = {
    "ordinary": lambda _: False,
    "allocated": lambda _: True,
    "allocated on even ranks": lambda rank: rank % 2 == 0,
    "allocated on the last rank": lambda rank: rank == dist.get_world_size() - 1,
}


def kinds_of_memory(backend: str) -> list[str]:
    return ["ordinary"] if backend == "gloo" else list(_OWN_MEMORY)


def operand(kind: str, value: torch.Tensor, offset: int = 64) -> Operand:
    """Return a tensor of that value, a view that begins `offset` elements into its memory."""
    numel = value.numel()
    make = allocate if _OWN_MEMORY[kind](dist.get_rank()) else _ordinary
    around = make(offset + numel + _GUARD, value.dtype)
    around.fill_(1)
    tensor = around[offset : offset + numel]
    tensor.copy_(value)
    return Operand(tensor, around, offset)


def _ordinary(numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(numel, dtype=dtype)
