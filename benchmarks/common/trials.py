"""How trials are interleaved and guarded, whatever is timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist


class WrongResultError(Exception):
    """A variant's values differ from the reference's, so its time means nothing."""


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: every second round starts one further, the others run backwards.

    So every variant takes every place, and not always after the same neighbour.
    """
    start = (number // 2) % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def refuse_on_any_rank(problem: str | None) -> None:
    """Raise on every rank what any rank found."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise WrongResultError(f"rank {rank}: {found}. No time is reported for a wrong result.")


@contextmanager
def no_collector_pauses() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
