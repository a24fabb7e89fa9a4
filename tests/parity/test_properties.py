"""Random training programs, on two and three ranks: what a program does to `.grad`, checked.

Each program runs with the Python engine, the native one, that as it fills buckets on a GPU, and two
engines in one job. Each must agree with the oracle of `tests/parity/oracle.py`, and all of them bit
for bit with each other.

FASTDDP_PROPERTY_EXAMPLES=2000 tries that many examples, new ones each time, instead of a few that
are always the same, and looks for the smallest program that fails.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastddp import extension
from tests.conftest import require_native
from tests.parity.checks import bits
from tests.parity.oracle import Oracle
from tests.parity.programs import (
    FLATTENING,
    NOT_DENSE,
    SHAPES,
    USES,
    Alone,
    Assign,
    Backward,
    Freeze,
    Operation,
    Param,
    Program,
    Term,
    Trace,
    Zero,
    run,
)
from tests.ranks import run_ranks
from tests.slow import slow_but_for

EXAMPLES = int(os.environ.get("FASTDDP_PROPERTY_EXAMPLES", "0"))

PROGRAMS_PER_EXAMPLE = 8
"""At most; a failing example shrinks to one."""

# float32 is the one that most bits can be wrong in by the native engine's own loops.
DTYPES = (
    *(torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.complex64, torch.complex128),
)


@st.composite
def programs(draw: st.DrawFn, world_size: int) -> Program:
    init_sync = draw(st.sampled_from([True, True, True, False]))
    shapes = [shape for shape in SHAPES if not (init_sync and shape in NOT_DENSE)]
    param = st.builds(
        Param,
        shape=st.sampled_from(shapes),
        dtype=st.sampled_from(DTYPES),
        trained=st.sampled_from([True, True, True, True, False]),
    )
    params = [Param("vector", torch.float32), *_several(draw, param, 0, 5)]
    indices = st.integers(0, len(params) - 1)
    term = st.builds(
        Term,
        use=st.sampled_from(USES),
        param=indices,
        other=indices,
        checkpointing=st.sampled_from(["no", "no", "no", "reentrant", "not reentrant"]),
    )
    terms = [Term("sum", 0, 0), *_several(draw, term, 0, 7)]
    caps = st.lists(st.sampled_from([1, 16, 64, 2**20]), min_size=1, max_size=3)
    return Program(
        params=tuple(params),
        terms=tuple(terms),
        operations=tuple(_several(draw, operations(world_size, params, len(terms)), 1, 12)),
        caps_bytes=tuple(draw(caps)),
        init_sync=init_sync,
    )


def _several(draw: st.DrawFn, of: st.SearchStrategy[Any], least: int, most: int) -> list[Any]:
    """Draws a list whose length is as often long as short, unlike that of `st.lists`."""
    return [draw(of) for _ in range(draw(st.integers(least, most)))]


@st.composite
def operations(draw: st.DrawFn, world_size: int, params: list[Param], num_terms: int) -> Operation:
    kinds = [Zero, Alone, Assign, Freeze, *[Backward] * 6]
    kind = draw(st.sampled_from(kinds))
    if kind is Zero:
        return Zero(draw(st.booleans()))
    if kind is Assign:
        return Assign(draw(st.integers(0, len(params) - 1)), odd=draw(st.booleans()))
    if kind is Alone:
        calls = ["forward", "no_grad", "grad of params", "grad of x", "inputs x"]
        what = st.sampled_from(calls)
        # The first parameter always requires a gradient, so that there is one to ask for.
        chosen = (0, *_several(draw, st.integers(0, num_terms - 1), 0, 5))
        return Alone(draw(st.integers(0, world_size - 1)), draw(what), chosen)
    # Not the first, which every rank relies on; nor any that was not trained from the beginning.
    may_freeze = [index for index, param in enumerate(params) if param.trained][1:]
    if kind is Freeze and may_freeze:
        return Freeze(draw(st.sampled_from(may_freeze)), frozen=draw(st.booleans()))
    return _backward(draw, world_size, num_terms)


def _backward(draw: st.DrawFn, world_size: int, num_terms: int) -> Backward:
    sync = draw(st.sampled_from([True, True, True, False]))
    how = draw(st.sampled_from(["sum"] * 4 + ["list", "twice", "inputs", "penalty", "direct"]))
    by_rank = []
    for _ in range(world_size):
        forwards = []
        for _ in range(draw(st.sampled_from([1, 1, 2, 3] if sync else [1, 0, 2]))):
            chosen = _several(draw, st.integers(0, num_terms - 1), 0, 6)
            if how in ("inputs", "penalty", "direct"):
                # Begun by a rank's first gradient, of which there must be one.
                chosen = [0, *chosen]
            forwards.append(tuple(chosen))
        by_rank.append(tuple(forwards))
    stop = None
    # The others would go on to a second round, or to one that this rank has not begun.
    if how in ("sum", "list") and draw(st.sampled_from([False, False, False, True])):
        rank = draw(st.integers(0, world_size - 1))
        stop = (rank, draw(st.integers(0, 1)), draw(st.integers(0, 3)))
    return Backward(tuple(by_rank), sync, how, stop, forward_differs=draw(st.booleans()))


def jobs(world_size: int) -> list[list[str]]:
    """Names each rank's engine, in each of the jobs that run a program."""
    if extension.load() is None:
        return [["python"] * world_size]
    mixed = [("native", "python")[rank % 2] for rank in range(world_size)]
    return [*([name] * world_size for name in ("python", "native", FLATTENING)), mixed]


def check(programs: list[Program], world_size: int) -> None:
    names = jobs(world_size)
    by_rank = run_ranks(run, world_size, programs, names, timeout=20.0)
    for program, by_rank_and_job in zip(programs, zip(*by_rank, strict=True), strict=True):
        check_program(program, names, by_rank_and_job)


def check_program(
    program: Program, names: list[list[str]], by_rank_and_job: Sequence[Sequence[Trace]]
) -> None:
    by_job = list(zip(*by_rank_and_job, strict=True))
    for job, traces in zip(names, by_job, strict=True):
        try:
            Oracle(program, traces).check()
            for rank, (trace, first) in enumerate(zip(traces, by_job[0], strict=True)):
                must_be_the_same(trace, first, f"rank {rank}, compared with engines {names[0]}")
        except AssertionError as error:
            raise AssertionError(f"{program}, engines {job}: {error}") from error


def must_be_the_same(one: Trace, other: Trace, what: str) -> None:
    for step, (a, b) in enumerate(zip(one.steps, other.steps, strict=True)):
        assert a.raised == b.raised, f"{what}: operation {step}"
        for index, (x, y) in enumerate(zip(a.grads, b.grads, strict=True)):
            assert bits(x) == bits(y), f"{what}: operation {step}: p{index}: {x} and {y}"


@pytest.mark.timeout(0 if EXAMPLES else 120)
@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
def test_random_programs(world_size: int) -> None:
    if os.environ.get("FASTDDP_REQUIRE_NATIVE") == "1":
        require_native()

    @settings(
        max_examples=EXAMPLES or 15,
        derandomize=not EXAMPLES,
        phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.lists(programs(world_size), min_size=1, max_size=PROGRAMS_PER_EXAMPLE))
    def every_program_is_right(programs: list[Program]) -> None:
        check(programs, world_size)

    every_program_is_right()
