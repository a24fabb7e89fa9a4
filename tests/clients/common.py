"""What the tests of other packages share: one run of ranks trains every way there is to compare.

Importing such a package takes seconds on each rank, so each test file starts ranks once and its
tests look at what they brought back.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from torch import Tensor

import fastddp
from fastddp import extension
from tests.parity.checks import assert_same_bits
from tests.ranks import run_ranks, scratch_folder

TORCH = "torch"


@dataclass
class Outcome:
    """What one training left on one rank."""

    wrapper: str
    """The module that defines the class that wrapped the model."""
    rounds: int | None
    """Synchronised backwards, where fastddp can tell."""
    weights: dict[str, Tensor]
    resumed: dict[str, Tensor] = field(default_factory=dict)
    """The weights of a training that was resumed from a checkpoint half-way, if there was one."""
    saved_keys: list[str] = field(default_factory=list)
    """The names in the file that the package saved."""


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed, or fail there where CI says that it must be.

    Without importing it, which takes seconds and may warn: the ranks do that, in their processes.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("FASTDDP_REQUIRE_CLIENTS") == "1":
        raise ImportError(f"FASTDDP_REQUIRE_CLIENTS=1, but {', '.join(missing)} is not installed")
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


Train: TypeAlias = Callable[[str, int, Path], Any]
"""`train(way, rank, folder)`; the folder is one for all ranks."""


def train_all_ways(*trains: Train) -> dict[str, dict[str, list[Any]]]:
    """Run each training with torch's class and with each engine, all in one start of two ranks.

    Returns by the training's name, then by way, what every rank returned.
    """
    engines = ["native", "python"] if extension.load() is not None else ["python"]
    ways = [TORCH, *engines]
    by_rank = run_ranks(_train_all, 2, trains, ways)
    return {
        train.__name__: {way: [rank[train.__name__, way] for rank in by_rank] for way in ways}
        for train in trains
    }


def _train_all(
    rank: int, world_size: int, trains: Sequence[Train], ways: Sequence[str]
) -> dict[tuple[str, str], Any]:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    launcher |= {"LOCAL_WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    return {
        (train.__name__, way): train(way, rank, scratch_folder() / train.__name__ / way)
        for train in trains
        for way in ways
    }


@contextmanager
def patched(way: str) -> Iterator[None]:
    """Redirect torch's class to an engine of fastddp, or to none."""
    if way == TORCH:
        yield
        return
    with engine_by_environment(way), fastddp.patch():
        yield


@contextmanager
def engine_by_environment(engine: str) -> Iterator[None]:
    """The user's way to choose an engine where it is not the user who wraps the model."""
    os.environ["FASTDDP_ENGINE"] = engine
    try:
        yield
    finally:
        del os.environ["FASTDDP_ENGINE"]


def copy_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def rounds_of(model: Any) -> int | None:
    return model.stats().rounds if isinstance(model, fastddp.DistributedDataParallel) else None


def assert_trained_alike(by_way: Mapping[str, list[Outcome]], engine: str, steps: int) -> None:
    """Ours was used, synchronised once per step, and left what torch's class leaves, bit for bit.

    `steps` are the optimizer's: a step of several backwards synchronises the last one alone.
    """
    for rank, (ours, torchs) in enumerate(zip(by_way[engine], by_way[TORCH], strict=True)):
        assert torchs.wrapper == "torch.nn.parallel.distributed"
        assert ours.wrapper == "fastddp.ddp.wrapper"
        assert ours.rounds == steps
        assert_same_bits(ours.weights, torchs.weights, f"rank {rank}, after training")


def assert_resumed_alike(by_way: Mapping[str, list[Outcome]], engine: str) -> None:
    """A checkpoint has the model's own names, and training goes on from it where it was."""
    for rank, (ours, torchs) in enumerate(zip(by_way[engine], by_way[TORCH], strict=True)):
        assert ours.saved_keys == torchs.saved_keys
        assert ours.saved_keys
        assert set(ours.saved_keys) <= set(ours.weights)
        assert_same_bits(ours.resumed, ours.weights, f"rank {rank}, resumed")
