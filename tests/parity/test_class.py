"""The wrapper's class: hooks of modules, copies and pickles are as with torch's."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits
from tests.parity.wrapped import Talker, assert_synchronises, prefixed
from tests.ranks import run_ranks


def _class_is_torchs(rank: int, world_size: int, engine: str) -> None:
    model = Talker()
    plain_keys = list(model.state_dict())
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    assert isinstance(ours, TorchDDP)
    assert isinstance(ours, nn.Module)
    assert ours.module is model

    assert list(ours.state_dict()) == prefixed(plain_keys)
    assert [n for n, _ in ours.named_parameters()] == prefixed(
        n for n, _ in model.named_parameters()
    )
    assert [n for n, _ in ours.named_buffers()] == ["module.count", "module.scratch"]
    assert [n for n, _ in ours.named_children()] == ["module"]
    assert [id(p) for p in ours.parameters()] == [id(p) for p in model.parameters()]

    theirs = TorchDDP(Talker())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"

    out = ours(ladder_x(rank, 0, world_size), times=3)
    assert out["times"] == 3
    out["loss"].backward()
    assert_ladder(model.ladder, 3 * mean_x(0, world_size), "keyword argument")

    assert ours.training
    assert model.training
    assert ours.eval() is ours
    assert not model.training
    assert not model.ladder.training
    ours(1.0)
    assert model.count.item() == 1, "one forward in training, one not"
    assert ours.train() is ours
    assert model.ladder.training

    with pytest.raises(AttributeError, match="note"):
        _ = ours.note  # as in torch: the class does not pass attributes on
    assert ours.process_group is torch.distributed.group.WORLD
    assert ours.device == torch.device("cpu")
    assert ours.device_ids is None
    assert ours.broadcast_buffers is True
    assert "Talker" in repr(ours)


def test_the_class_is_torchs(engine: str) -> None:
    run_ranks(_class_is_torchs, 2, engine)


def _hooks_of_modules(rank: int, world_size: int, engine: str) -> None:
    """A wrapper is a module: hooks on it and on the model run once per forward."""
    for make in (fastddp.DistributedDataParallel, fastddp.wrap):
        model = Ladder()
        ours = make(model, engine=engine)
        calls: list[str] = []
        ours.register_forward_pre_hook(lambda *_, calls=calls: calls.append("outer before"))
        ours.register_forward_hook(lambda *_, calls=calls: calls.append("outer after"))
        model.register_forward_hook(lambda *_, calls=calls: calls.append("inner after"))
        ours(1.0)
        assert calls == ["outer before", "inner after", "outer after"], make


def test_module_hooks(engine: str) -> None:
    run_ranks(_hooks_of_modules, 2, engine)


def _copies(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)
    model = Ladder()
    ours = make(model, engine=engine, bucket_cap_mb=16 / 2**20)
    assert_synchronises(ours, rank, world_size, "original")

    def through_torch_save(module: nn.Module) -> Any:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for how in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save):
        new = how(ours)
        assert type(new) is type(ours)
        assert new.module is not ours.module
        assert_same_bits(new.state_dict(), ours.state_dict(), str(how))
        mine = {id(p) for p in ours.parameters()}
        assert not mine & {id(p) for p in new.parameters()}
        assert {id(p) for p in new.parameters()} == {id(p) for p in new.module.parameters()}
        assert_synchronises(new, rank, world_size, f"copy by {how}")
        again = copy.deepcopy(new)
        del new  # a copy of a copy stands alone
        assert_synchronises(again, rank, world_size, f"copy of copy by {how}")
        with again.no_sync():
            again.zero_grad()
            again(ladder_x(rank, 0, world_size)).backward()
        assert_ladder(again.module, ladder_x(rank, 0, world_size), "no_sync of a copy")
        assert_synchronises(ours, rank, world_size, "the original goes on")


@pytest.mark.parametrize("make_name", ["DistributedDataParallel", "wrap"])
def test_copies_keep_synchronising(make_name: str, engine: str) -> None:
    run_ranks(_copies, 2, make_name, engine)


def _copy_in_the_middle(rank: int, world_size: int, engine: str) -> None:
    """With torch a static-graph module that is copied part-way stops synchronising, silently."""
    for static in (False, True):
        ours = fastddp.DistributedDataParallel(Ladder(), engine=engine, static_graph=static)
        with ours.no_sync():
            ours(ladder_x(rank, 0, world_size)).backward()
        new = pickle.loads(pickle.dumps(ours))
        assert_synchronises(new, rank, world_size, f"static_graph={static}")


def test_a_copy_made_part_way_synchronises(engine: str) -> None:
    run_ranks(_copy_in_the_middle, 2, engine)


def _pickled(rank: int, world_size: int, engine: str) -> bytes:
    ours = fastddp.wrap(Ladder(), engine=engine)
    assert_synchronises(ours, rank, world_size, "before")
    with torch.no_grad():
        ours.a.fill_(7.0)
    return pickle.dumps(ours)


def test_a_wrapped_model_loads_where_there_is_no_group(engine: str) -> None:
    """As for inference, or to go on training in one process."""
    (data, _) = run_ranks(_pickled, 2, engine)
    ours = pickle.loads(data)
    assert ours.process_group is None
    assert ours.a.tolist() == [7.0] * 3
    ours(5.0).backward()
    assert_ladder(ours.module, 5.0, "a world of one")


def _pickle_of_a_sub_group(rank: int, world_size: int, engine: str) -> None:
    group = torch.distributed.new_group([0, 1])
    for make in (fastddp.DistributedDataParallel, fastddp.wrap):
        ours = make(Ladder(), process_group=group, engine=engine)
        with pytest.raises(RuntimeError, match="default process group"):
            pickle.dumps(ours)
        assert_synchronises(copy.deepcopy(ours), rank, world_size, "deepcopy keeps the group")


def test_pickling_needs_the_default_group(engine: str) -> None:
    run_ranks(_pickle_of_a_sub_group, 2, engine)
