"""Models and options that differ between ranks are refused on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastddp
from tests.models import CASES, Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.parity.wrapping import MAKES
from tests.ranks import run_ranks


def _net(**changes: Any) -> nn.Module:
    """One parameter after another, each of which a rank may have otherwise."""
    settings: dict[str, Any] = {
        "first": (2, 3),
        "second": (5,),
        "dtype": torch.float32,
        "extra": False,
        "frozen": False,
        "buffer": (4,),
    }
    settings |= changes
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(settings["first"]))
    model.second = nn.Parameter(torch.zeros(settings["second"], dtype=settings["dtype"]))
    model.second.requires_grad_(not settings["frozen"])
    if settings["extra"]:
        model.extra = nn.Parameter(torch.zeros(7))
    model.register_buffer("table", torch.zeros(settings["buffer"]))
    return model


MISMATCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # what the odd rank changes, and what the error has to say
    "shape": ({"first": (3, 2)}, ["'first'", "(3, 2)", "(2, 3)"]),
    "numel": ({"first": (2, 4)}, ["'first'", "(2, 4)", "(2, 3)"]),
    "dtype": ({"dtype": torch.float64}, ["'second'", "torch.float64", "torch.float32"]),
    "one more": ({"extra": True}, ["'extra'", "(7,)"]),
    "requires_grad": ({"frozen": True}, ["'second'", "requires grad"]),
    "buffer": ({"buffer": (9,)}, ["'table'", "(9,)", "(4,)"]),
}


def _mismatch(rank: int, world_size: int, make_name: str, engine: str) -> dict[str, str]:
    make = getattr(fastddp, make_name)
    said = {}
    for odd in range(world_size):
        for what, (changes, _) in MISMATCHES.items():
            model = _net(**(changes if rank == odd else {}))
            with pytest.raises(fastddp.MismatchError) as caught:
                make(model, engine=engine)
            assert isinstance(caught.value, RuntimeError)
            said[f"{what}, rank {odd}"] = str(caught.value)
    ours = make(Ladder(), engine=engine)  # the group is as good as before
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "after all that")
    return said


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("make_name", MAKES)
def test_models_that_differ_are_refused_on_every_rank(
    make_name: str, world_size: int, engine: str
) -> None:
    by_rank = run_ranks(_mismatch, world_size, make_name, engine)
    assert len(by_rank[0]) == len(MISMATCHES) * world_size
    for said in by_rank:
        assert said == by_rank[0], "all ranks say the same"
    for odd in range(world_size):
        for what, (_, words) in MISMATCHES.items():
            text = by_rank[0][f"{what}, rank {odd}"]
            # Seen from rank 0: when it is itself the odd one, rank 1 is the first that differs.
            for word in [*words, f"rank {odd or 1}", "rank 0"]:
                assert word in text, (what, odd, word, text)


def _strides_differ(rank: int, world_size: int, engine: str) -> None:
    """A broadcast of bytes would scramble the weights without a word."""
    case = CASES["cnn" if rank == 0 else "channels_last"]
    with pytest.raises(fastddp.MismatchError, match=r"rank 1.*conv1\.weight.*strides"):
        fastddp.DistributedDataParallel(case.build(), engine=engine)
    cap_mb = 1.0 + rank
    with pytest.raises(fastddp.MismatchError, match=r"bucket.*2 MiB on rank 1.*1 MiB on rank 0"):
        fastddp.DistributedDataParallel(Ladder(), engine=engine, bucket_cap_mb=cap_mb)
    cap_mb = float("inf") if rank == 0 else 1.0
    with pytest.raises(fastddp.MismatchError, match=r"bucket.*1 MiB on rank 1.*no limit on rank 0"):
        fastddp.DistributedDataParallel(Ladder(), engine=engine, bucket_cap_mb=cap_mb)
    for name in ("broadcast_buffers", "forward_sync_buffers"):
        with pytest.raises(fastddp.MismatchError, match=r"broadcast_buffers.*rank 1.*rank 0"):
            fastddp.DistributedDataParallel(Ladder(), engine=engine, **{name: rank == 0})
    embedding = nn.Embedding(3, 2, sparse=rank == 0)  # which decides over the plan
    with pytest.raises(fastddp.MismatchError, match=r"'weight' has .*, sparse gradient on rank 0"):
        fastddp.DistributedDataParallel(embedding, engine=engine)


def test_strides_and_options_that_differ_are_refused(engine: str) -> None:
    run_ranks(_strides_differ, 2, engine)


def _same_names_other_order(rank: int, world_size: int, engine: str) -> None:
    model = nn.Module()
    for name in "ab" if rank == 0 else "ba":
        model.register_parameter(name, nn.Parameter(torch.zeros(2)))
    with pytest.raises(fastddp.MismatchError, match="order"):
        fastddp.DistributedDataParallel(model, engine=engine)


def test_another_order_of_the_same_parameters_is_refused(engine: str) -> None:
    run_ranks(_same_names_other_order, 2, engine)
