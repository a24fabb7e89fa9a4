"""The order of interleaved trials, and guards around them. All benchmarks share these."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist


class WrongResultError(Exception):
    """The values of a variant differ from those of the reference, so its time means nothing."""


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """Returns the order of the variants in round `number`.

    Every second round begins one variant later, and the rounds between run backwards. So every
    variant takes every place, and does not always follow the same neighbour.
    """
    start = (number // 2) % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def refuse_on_any_rank(problem: str | None) -> None:
    """Raises an error on every rank if any rank has found a problem. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise WrongResultError(f"rank {rank}: {found}. No time is reported for a wrong result.")


@contextmanager
def no_collector_pauses() -> Iterator[None]:
    """Turns Python's garbage collector off in a block, so that no pass of it is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
