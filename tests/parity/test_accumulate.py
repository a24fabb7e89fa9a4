"""`fastddp.accumulate`: the average of the sum, once in so many micro-batches."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.ranks import run_ranks


def _steps(rank: int, world_size: int, engine: str, forward_inside: bool) -> list[bool]:
    model = fastddp.wrap(Ladder(), engine=engine)
    completes = []
    for micro in range(7):
        x = ladder_x(rank, micro, world_size)
        if forward_inside:
            with fastddp.accumulate(model, 3) as complete:
                model(x).backward()
        else:
            total = model(x)
            with fastddp.accumulate(model, 3) as complete:
                total.backward()
        completes.append(complete)
        group = range(micro - micro % 3, micro + 1)
        if complete:
            assert_ladder(model, sum(mean_x(m, world_size) for m in group), micro)
            model.zero_grad()
        else:
            assert_ladder(model, sum(ladder_x(rank, m, world_size) for m in group), micro)
    assert model.stats().rounds == 2
    return completes


@pytest.mark.parametrize("forward_inside", [True, False])
def test_every_third_is_averaged(engine: str, forward_inside: bool) -> None:
    for completes in run_ranks(_steps, 2, engine, forward_inside):
        assert completes == [False, False, True, False, False, True, False]


def _last(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(Ladder(), engine=engine)
    for micro in range(2):
        with fastddp.accumulate(model, 4, last=micro == 1) as complete:
            model(ladder_x(rank, micro, world_size)).backward()
    assert complete
    assert_ladder(model, mean_x(0, world_size) + mean_x(1, world_size), "the rest")
    model.zero_grad()
    with fastddp.accumulate(model, 2) as complete:
        model(1.0).backward()
    assert not complete, "the count begins anew after a step"


def test_the_last_one_completes_what_there_is(engine: str) -> None:
    run_ranks(_last, 2, engine)


def _raising(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(Ladder(), engine=engine)

    def fail() -> None:
        with fastddp.accumulate(model, 2):
            raise KeyError

    if rank == 0:
        with pytest.raises(KeyError):
            fail()
    else:
        with fastddp.accumulate(model, 2):
            model(2.0).backward()
    assert model.require_backward_grad_sync
    with fastddp.accumulate(model, 2) as complete:
        model(2.0).backward()
    assert complete
    assert_ladder(model, 3.0, "both that did not raise")


def test_a_block_that_raises_counts_as_on_the_other_ranks(engine: str) -> None:
    run_ranks(_raising, 2, engine)


def test_alone_it_counts_too() -> None:
    model = fastddp.wrap(Ladder())
    seen = []
    for _ in range(4):
        with fastddp.accumulate(model, 2) as complete:
            model(1.0).backward()
        seen.append(complete)
    assert seen == [False, True, False, True]


@pytest.mark.parametrize("model", [nn.Linear(1, 1), TorchDDP])
def test_a_model_that_is_not_wrapped_is_refused(model: object) -> None:
    with pytest.raises(TypeError, match="is not wrapped"), fastddp.accumulate(model, 2):
        pass


def test_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="got 0"), fastddp.accumulate(fastddp.wrap(Ladder()), 0):
        pass
