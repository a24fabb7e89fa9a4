"""Torch's tests of its DistributedDataParallel, with ours in its place; see `expected`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.ranks import RankFailed, run_ranks
from tests.slow import slow_but_for
from tests.torch_suite import judge
from tests.torch_suite.expected import DIFFERENT, NOT_RUN, PASSES, TORCH, world_size

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("expecttest", judge.MODULE)),
    reason="needs expecttest and a torch that carries its tests",
)


# Whether they are still there and still judged as said; the others take minutes.
QUICK = (
    "test_DistributedDataParallelCPU",
    "test_ddp_namedtuple",
    "test_ddp_ignore_params_arg",
    "test_ddp_static_graph_nested_types",
    "test_invalid_static_graph",
)


@pytest.mark.parametrize("name", slow_but_for(QUICK, PASSES))
def test_passes(name: str, engine: str) -> None:
    judge_(name, engine)


@pytest.mark.parametrize("name", slow_but_for(QUICK, DIFFERENT))
def test_differs_as_said(name: str) -> None:
    """One engine will do: what differs is what both have around them.

    A test that passes belongs in `PASSES`.
    """
    with pytest.raises(RankFailed, match=DIFFERENT[name].error):
        judge_(name, "python")


def test_every_test_has_an_expectation() -> None:
    if not torch.__version__.startswith(TORCH + "."):
        pytest.skip(f"the tables are for torch {TORCH}")
    names = run_ranks(judge.tests_of_ddp, 1, init_group=False)[0]
    tables = [*PASSES, *DIFFERENT, *NOT_RUN]
    assert sorted(name for name in tables if "." not in name) == names
    assert len(set(tables)) == len(tables), "a test is in two tables"


def judge_(name: str, engine: str) -> None:
    with_rpc = "." in name
    outcomes = run_ranks(judge.run_test, world_size(name), name, engine, init_group=not with_rpc)
    if set(outcomes) != {judge.PASSED}:
        pytest.skip(", ".join(sorted(set(outcomes))))
