"""Arguments that no collective can work with are refused, and the group goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.comm.common import case, expect, given, reduced, run_group


def _calls_with_wrong_arguments(world_size: int) -> dict[str, tuple[Callable, str]]:
    """Map what is wrong to a call that all ranks make, and to what the message has to hold."""
    x, flat = torch.ones(4), torch.ones(4 * world_size)
    return {
        "an operation's name": (lambda: dist.all_reduce(x, op="sum"), ""),
        "a list for a tensor": (lambda: dist.all_reduce([x]), "list"),
        "no such root": (lambda: dist.broadcast(x, group_src=5), r"\b5\b"),
        "no such root of a reduce": (lambda: dist.reduce(x, group_dst=5), r"\b5\b"),
        "too few outputs": (lambda: dist.all_gather([x], x.clone()), rf"\b{world_size}\b.*\b1\b"),
        "outputs of another dtype": (
            lambda: dist.all_gather([x.double()] * world_size, x),
            "float64|Double",
        ),
        "outputs of another size": (
            lambda: dist.all_gather([torch.ones(3) for _ in range(world_size)], x),
            r"\b[34]\b",
        ),
        "output of another size": (
            lambda: dist.all_gather_into_tensor(torch.ones(4 * world_size + 1), x),
            r"\d",
        ),
        "too few inputs": (lambda: dist.reduce_scatter(x, [x.clone()]), "size|number|list"),
        "input of another size": (
            lambda: dist.reduce_scatter_tensor(x, torch.ones(4 * world_size + 1)),
            rf"\b{4 * world_size + 1}\b",
        ),
        "splits that do not add up": (
            lambda: dist.all_to_all_single(torch.ones(4 * world_size), flat, [1] * world_size),
            "(?i)split",
        ),
        "a message to oneself": (lambda: dist.send(x, dist.get_rank()), "rank"),
    }


def _wrong_arguments(rank: int, world_size: int) -> None:
    for name, (call, said) in _calls_with_wrong_arguments(world_size).items():
        with case(name):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=said):
                call()
            x = given(rank, 9)
            dist.all_reduce(x)
            expect(x, reduced(world_size, 9))


def test_wrong_arguments_are_refused_and_break_nothing(backend):
    run_group(_wrong_arguments, 2, backend)
