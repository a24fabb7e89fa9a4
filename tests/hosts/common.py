"""What the tests of groups that span hosts share: ranks on several hosts, and exact values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import init_group, run_ranks

CPU = torch.device("cpu")
# Of a pattern that repeats. Prime, so that whatever is displaced by a piece, a page or a share of
# one shows.
PERIOD = 4099


def run_on_hosts(
    fn: Callable[..., Any],
    hosts: str,
    *args: Any,
    backend: str = "shm",
    group_timeout_s: float = 30.0,
    **options: Any,
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on ranks that count as on hosts.

    Args:
        fn: as for `run_ranks`.
        hosts: a letter for each rank, which names its host.
        args: of `fn`.
        backend: of the default group.
        group_timeout_s: of the default group.
        options: those of `run_ranks`.
    """
    __tracebackhide__ = True
    call = (fn, hosts, backend, group_timeout_s, args)
    return run_ranks(_on_its_host, len(hosts), *call, init_group=False, **options)


def _on_its_host(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    hosts: str,
    backend: str,
    group_timeout_s: float,
    args: tuple[Any, ...],
) -> Any:
    os.environ["FASTDDP_HOST_ID"] = hosts[rank]
    import fastddp  # noqa: F401 - registers the backend

    init_group(backend, group_timeout_s)
    return fn(rank, world_size, *args)


def backend_of(group: dist.ProcessGroup | None = None) -> Any:
    return (group or dist.group.WORLD)._get_backend(CPU)


def allocate(numel: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None) -> Any:
    """Return memory of the backend's own, in which collectives need no copies."""
    return backend_of(group).allocate_tensor(numel, dtype=dtype, device=CPU)


def error_of(action: Callable[[], Any]) -> str:
    """Return the message of the RuntimeError that an action raises."""
    with pytest.raises(RuntimeError) as caught:
        action()
    return str(caught.value)


@contextlib.contextmanager
def case(name: str) -> Iterator[None]:
    """Name the case in whatever is raised in it; many cases share one start of ranks."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"case {name}: {type(error).__name__}: {error}") from error


def given(rank: int, numel: int, dtype: torch.dtype = torch.float32, op: str = "SUM") -> Any:
    """Return what a rank gives, small whole numbers whose reductions are exact in any dtype."""
    index = torch.arange(PERIOD)
    mixed = (index * index * (2 * rank + 3) + 31 * index * (rank + 1) + 7 * rank) % 8191 % 97
    if dtype == torch.bool:
        whole = mixed % 3 == 0
    elif op == "PRODUCT":
        whole = mixed % 2 + 1
    elif op == "AVG":
        whole = mixed % 3 * 12  # divided by 2, 3 or 4 it stays whole
    else:
        whole = mixed % 23
    return whole.to(dtype).repeat(numel // PERIOD + 1)[:numel]


def reduced(
    ranks: list[int], numel: int, dtype: torch.dtype = torch.float32, op: str = "SUM"
) -> Any:
    """Return the reduction of what the ranks give."""
    wide = torch.int64
    result, *others = (given(rank, PERIOD, dtype, op).to(wide) for rank in ranks)
    combine: dict[str, Callable[..., Any]] = {
        "SUM": torch.add,
        "AVG": torch.add,
        "PRODUCT": torch.mul,
        "MIN": torch.minimum,
        "MAX": torch.maximum,
        "BAND": torch.bitwise_and,
        "BOR": torch.bitwise_or,
        "BXOR": torch.bitwise_xor,
    }
    for other in others:
        result = combine[op](result, other)
    if op == "AVG":
        result = result // len(ranks)
    return result.to(dtype).repeat(numel // PERIOD + 1)[:numel]
