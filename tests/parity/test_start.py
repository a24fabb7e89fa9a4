"""Ranks start with the values of rank 0, and buffers are those of rank 0 before each forward."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import CASES, Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits
from tests.parity.wrapping import MAKES
from tests.ranks import run_ranks


def _rank_0_wins(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)
    for case in CASES.values():
        model = case.build()
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(rank)
        pointers = [p.data_ptr() for p in model.parameters()]
        make(model, engine=engine)
        assert_same_bits(model.state_dict(), case.build().state_dict(), case.name)
        assert [p.data_ptr() for p in model.parameters()] == pointers, "written in place"

    model = Ladder()
    with torch.no_grad():
        model.a.fill_(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # made before wrapping
    ours = make(model, engine=engine)
    ours(ladder_x(rank, 0, world_size)).backward()
    optimizer.step()
    assert model.a.unique().tolist() == [0.0 - mean_x(0, world_size)]


@pytest.mark.parametrize("make_name", MAKES)
def test_every_rank_starts_with_the_values_of_rank_0(make_name: str, engine: str) -> None:
    run_ranks(_rank_0_wins, 3, make_name, engine)


class Buffers(nn.Module):
    """Counts its forwards, adding something that differs by rank; the loss shows what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("sum", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: float) -> Tensor:
        seen = self.sum.clone()
        if self.training:
            self.sum += x
            self.count += 1
            self.flag.logical_not_()
        return self.weight.sum() * x + seen.sum()


def _buffers(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)

    def fresh() -> Buffers:
        model = Buffers()
        model.sum.fill_(10.0 * (rank + 1))
        return model

    model = fresh()
    ours = make(model, engine=engine)
    assert model.sum.tolist() == [10.0] * 3, "rank 0's at the start"
    for step in range(3):
        ours(float(rank + 1)).backward()
        # Before each forward all have rank 0's: 10 + one for each forward of rank 0 before.
        assert model.sum.tolist() == [10.0 + step + rank + 1] * 3
        assert model.count.item() == step + 1
        assert model.flag.tolist() == [step % 2 == 0] * 2

    # As in torch: not under no_sync, nor in the first forward after it; see its require_forward_...
    theirs_model, ours_model = fresh(), fresh()
    theirs, ours = TorchDDP(theirs_model), make(ours_model, engine=engine)
    for sync in (True, False, False, True, True):
        for wrapped in (theirs, ours):
            with contextlib.nullcontext() if sync else wrapped.no_sync():
                wrapped(float(rank + 1)).backward()
            assert wrapped.require_forward_param_sync == sync
        assert_same_bits(
            dict(ours_model.named_buffers()), dict(theirs_model.named_buffers()), "as torch"
        )
    for wrapped in (theirs, ours):  # nor if it is told so
        wrapped.require_forward_param_sync = False
        wrapped(float(rank + 1)).backward()
        assert wrapped.require_forward_param_sync
    assert_same_bits(
        dict(ours_model.named_buffers()), dict(theirs_model.named_buffers()), "told so, as torch"
    )
    for value in (False, True):  # nor for as long as it is told so
        for name in ("broadcast_buffers", "forward_sync_buffers"):
            for wrapped in (theirs, ours):
                setattr(wrapped, name, value)
                wrapped(float(rank + 1)).backward()
                assert wrapped.forward_sync_buffers == wrapped.broadcast_buffers == value
            assert copy.deepcopy(ours).forward_sync_buffers == value
            assert_same_bits(
                dict(ours_model.named_buffers()), dict(theirs_model.named_buffers()), name
            )

    # Without grad mode never, unlike torch; the forward in grad mode after it makes up for that.
    model = fresh()
    ours = make(model, engine=engine)
    for mode in (torch.no_grad, torch.inference_mode):
        model.sum = torch.full((3,), 10.0 * rank)
        for train in (False, True):
            with mode():
                ours.train(train)(float(rank + 1))
        assert model.sum.tolist() == [11.0 * rank + 1] * 3
        ours._sync_buffers()
        assert model.sum.tolist() == [1.0] * 3
        model.sum = torch.full((3,), 10.0 * rank)
        ours(float(rank + 1)).backward()
        assert model.sum.tolist() == [1.0 + rank] * 3

    model = fresh()
    ours = make(model, engine=engine, broadcast_buffers=False)
    assert model.sum.tolist() == [10.0 * (rank + 1)] * 3, "neither at the start"
    ours(float(rank + 1)).backward()
    ours(float(rank + 1)).backward()
    assert model.sum.tolist() == [10.0 * (rank + 1) + 2 * (rank + 1)] * 3, "nor before forward"

    model = fresh()
    ours = make(model, engine=engine, forward_sync_buffers=False)
    assert model.sum.tolist() == [10.0] * 3, "at the start"
    ours(float(rank + 1)).backward()
    ours(float(rank + 1)).backward()
    assert model.sum.tolist() == [10.0 + 2 * (rank + 1)] * 3, "not before forward"

    model = fresh()
    with torch.no_grad():
        model.weight.fill_(rank)
    make(model, engine=engine, init_sync=False)
    assert model.sum.tolist() == [10.0 * (rank + 1)] * 3
    assert model.weight.tolist() == [float(rank)] * 2

    model = fresh()  # a buffer that is replaced, not written to, and one that changes its device id
    ours = make(model, engine=engine)
    for _ in range(2):
        model.sum = torch.full((3,), float(rank))
        ours(0.0).backward()
        assert model.sum.tolist() == [0.0] * 3


@pytest.mark.parametrize("make_name", MAKES)
def test_buffers_are_those_of_rank_0_before_each_forward(make_name: str, engine: str) -> None:
    run_ranks(_buffers, 2, make_name, engine)


def _ignored(rank: int, world_size: int, engine: str) -> None:
    model = Ladder()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank)
    TorchDDP._set_params_and_buffers_to_ignore_for_model(model, ["b", "d"])
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    assert [p.unique().item() for p in model.parameters()] == [0, rank, 0, rank, 0]
    ours(ladder_x(rank, 0, world_size)).backward()
    mean, x = mean_x(0, world_size), ladder_x(rank, 0, world_size)
    assert_ladder(
        model, {"a": mean, "b": x, "c": mean, "d": x, "e": mean}, "ignored ones are local"
    )


def test_parameters_that_the_model_asks_to_ignore(engine: str) -> None:
    run_ranks(_ignored, 2, engine)
