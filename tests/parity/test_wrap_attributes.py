"""What `wrap` returns has the attributes and methods of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder
from tests.parity.wrapped import Talker, assert_synchronises
from tests.ranks import run_ranks


def _attributes(rank: int, world_size: int, engine: str) -> None:
    model = Talker()
    ours = fastddp.wrap(model, engine=engine)
    assert ours.note == "fresh"
    assert ours.scale == 2
    assert ours.doubled == 4
    assert ours.ladder is model.ladder
    assert ours.count is model.count
    ours.note = "set"
    assert model.note == "set"
    ours.brand_new = 5
    assert model.brand_new == 5
    del ours.brand_new
    assert not hasattr(model, "brand_new")
    assert not hasattr(ours, "brand_new")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = ours.no_such_thing
    with pytest.raises(AttributeError):
        del ours.no_such_thing
    assert ours.rename("by method").note == "by method"
    assert "rename" in dir(ours)
    assert "note" in dir(ours)
    assert "no_sync" in dir(ours)

    ours.count = torch.tensor(11)
    assert model.count.item() == 11
    assert ours.state_dict()["count"].item() == 11
    ours.register_buffer("later", torch.ones(1))
    assert model.later.item() == 1.0
    ours.extra = nn.Linear(1, 1)
    assert "extra.weight" in ours.state_dict()
    assert model.extra is ours.extra
    del ours.extra
    assert "extra" not in dict(model.named_children())

    assert ours.training is True
    assert ours.eval() is ours
    assert (model.training, model.ladder.training) == (False, False)
    ours.training = True
    assert model.training is True
    assert ours.train() is ours
    assert model.ladder.training is True
    assert ours.get_parameter("ladder.a") is model.ladder.a
    assert ours.get_submodule("ladder") is model.ladder

    visited: list[str] = []
    assert ours.apply(lambda m: visited.append(type(m).__name__)) is ours
    assert visited == ["Ladder", "Talker"]
    assert ours.requires_grad_(True) is ours


def test_wrap_passes_attributes_and_methods_on(engine: str) -> None:
    run_ranks(_attributes, 2, engine)


def _other_methods(rank: int, world_size: int, engine: str) -> None:
    model = Talker()
    ours = fastddp.wrap(model, engine=engine)
    for step in range(3):
        ours.zero_grad()
        ours.training_step(ladder_x(rank, step, world_size)).backward()
        assert_ladder(model.ladder, mean_x(step, world_size), ("a method of the model", step))
        ours.zero_grad()
        model(ladder_x(rank, step, world_size))["loss"].backward()
        assert_ladder(model.ladder, mean_x(step, world_size), ("the model itself", step))
        ours.zero_grad()
        with ours.no_sync():
            ours.training_step(ladder_x(rank, step, world_size)).backward()
        assert_ladder(model.ladder, ladder_x(rank, step, world_size), ("no_sync", step))
    ours.zero_grad()
    ours(ladder_x(rank, 0, world_size), times=2)["loss"].backward()
    assert_ladder(model.ladder, 2 * mean_x(0, world_size), "keyword argument")


def test_methods_other_than_forward_synchronise(engine: str) -> None:
    run_ranks(_other_methods, 2, engine)


def _containers(rank: int, world_size: int, engine: str) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    ours = fastddp.wrap(model, engine=engine)
    assert len(ours) == 3
    assert list(ours) == list(model)
    assert ours[0] is model[0]
    assert ours[-1] is model[2]
    assert list(ours[1:]) == [model[1], model[2]]
    assert model[1] in ours
    assert bool(ours) is True
    ours[1] = nn.ReLU()
    assert isinstance(model[1], nn.ReLU)
    loss_of(ours(torch.randn(2, 7))).backward()

    names = fastddp.wrap(nn.ModuleDict({"x": nn.Linear(1, 1)}), engine=engine)
    assert list(names) == ["x"]
    assert "x" in names
    assert isinstance(names["x"], nn.Linear)
    assert list(names.keys()) == ["x"]

    with pytest.raises(TypeError):
        len(fastddp.wrap(Ladder(), engine=engine))
    with pytest.raises(TypeError):
        iter(fastddp.wrap(Ladder(), engine=engine))


def test_wrapped_containers(engine: str) -> None:
    run_ranks(_containers, 2, engine)


def _conversions(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.wrap(Ladder(), engine=engine)
    assert ours.to(torch.device("cpu")) is ours
    assert_synchronises(ours, rank, world_size, "to the device it is on")
    # A dtype that changes after wrapping changes what the buckets hold. Convert first, or expect:
    for convert, dtype in (
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
    ):
        converted = convert(fastddp.wrap(Ladder(), engine=engine))
        assert {p.dtype for p in converted.parameters()} == {dtype}
        assert {p.dtype for p in converted.module.parameters()} == {dtype}
        assert isinstance(converted, TorchDDP), "the wrapper comes back, not the model"
        assert_synchronises(converted, rank, world_size, f"converted to {dtype}")
        assert {p.grad.dtype for p in converted.parameters()} == {dtype}
        before = fastddp.wrap(convert(Ladder()), engine=engine)
        assert_synchronises(before, rank, world_size, f"{dtype} before")


def test_conversions_of_a_wrapped_model(engine: str) -> None:
    run_ranks(_conversions, 2, engine)


def _conversion_part_way(rank: int, world_size: int, engine: str) -> None:
    for make in (fastddp.wrap, fastddp.DistributedDataParallel):
        ours = make(Ladder(), engine=engine)
        assert_synchronises(ours, rank, world_size, "before")
        ours.zero_grad()
        ours.double()
        assert_synchronises(ours, rank, world_size, "after")
        assert {p.grad.dtype for p in ours.parameters()} == {torch.float64}


def test_conversion_after_the_first_steps(engine: str) -> None:
    run_ranks(_conversion_part_way, 2, engine)
