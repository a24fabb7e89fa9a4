"""The two faces: the class is torch's class, and what `wrap` returns is the model itself."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.optim.swa_utils import AveragedModel

import fastddp
from tests.models import CASES, ConvNet, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, bits, gradients
from tests.ranks import run_ranks


class Talker(nn.Module):
    """A model with a life of its own: attributes, methods, keyword arguments, buffers."""

    scale = 2

    def __init__(self) -> None:
        super().__init__()
        self.ladder = Ladder()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.note = "fresh"

    @property
    def doubled(self) -> int:
        return 2 * self.scale

    def forward(self, x: float, *, times: int = 1) -> dict[str, Any]:
        self.count += self.training
        return {"loss": times * self.ladder(x), "times": times}

    def training_step(self, x: float) -> Tensor:
        """A method other than forward that runs the parameters."""
        return self.ladder(x)

    def rename(self, note: str) -> Talker:
        self.note = note
        return self


class CustomCheckpoint(nn.Module):
    """Stores its parameter under another name, as some models do for old checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        state[prefix + "old_name"] = state.pop(prefix + "weight")
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        renamed = {k.replace("old_name", "weight"): v for k, v in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def _prefixed(names: Any) -> list[str]:
    return [f"module.{name}" for name in names]


def _assert_synchronises(model: Any, rank: int, world_size: int, what: str) -> None:
    """For a wrapped `Ladder`."""
    for step in range(3):
        model.zero_grad()
        model(ladder_x(rank, step, world_size)).backward()
        ladder = model if isinstance(model, Ladder) else model.module
        assert_ladder(ladder, mean_x(step, world_size), (what, step))


# --- the class ------------------------------------------------------------------------------------


def _class_is_torchs(rank: int, world_size: int, engine: str) -> None:
    model = Talker()
    plain_keys = list(model.state_dict())
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    assert isinstance(ours, TorchDDP)
    assert isinstance(ours, nn.Module)
    assert ours.module is model

    assert list(ours.state_dict()) == _prefixed(plain_keys)
    assert [n for n, _ in ours.named_parameters()] == _prefixed(
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
    _assert_synchronises(ours, rank, world_size, "original")

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
        _assert_synchronises(new, rank, world_size, f"copy by {how}")
        again = copy.deepcopy(new)
        del new  # a copy of a copy stands alone
        _assert_synchronises(again, rank, world_size, f"copy of copy by {how}")
        with again.no_sync():
            again.zero_grad()
            again(ladder_x(rank, 0, world_size)).backward()
        assert_ladder(again.module, ladder_x(rank, 0, world_size), "no_sync of a copy")
        _assert_synchronises(ours, rank, world_size, "the original goes on")


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
        _assert_synchronises(new, rank, world_size, f"static_graph={static}")


def test_a_copy_made_part_way_synchronises(engine: str) -> None:
    run_ranks(_copy_in_the_middle, 2, engine)


def _pickled(rank: int, world_size: int, engine: str) -> bytes:
    ours = fastddp.wrap(Ladder(), engine=engine)
    _assert_synchronises(ours, rank, world_size, "before")
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
        _assert_synchronises(copy.deepcopy(ours), rank, world_size, "deepcopy keeps the group")


def test_pickling_needs_the_default_group(engine: str) -> None:
    run_ranks(_pickle_of_a_sub_group, 2, engine)


# --- wrap: names ----------------------------------------------------------------------------------


def _wrap_keeps_names(rank: int, world_size: int, engine: str) -> None:
    for case in CASES.values():
        plain, model = case.build(), case.build()
        ours = fastddp.wrap(model, engine=engine)
        assert ours.module is model
        assert isinstance(ours, TorchDDP)
        for listing in ("named_parameters", "named_buffers", "named_modules", "named_children"):
            got = [name for name, _ in getattr(ours, listing)()]
            want = [name for name, _ in getattr(plain, listing)()]
            assert got == want, (case.name, listing)
        assert [id(p) for p in ours.parameters()] == [id(p) for p in model.parameters()]
        assert [id(c) for c in ours.children()] == [id(c) for c in model.children()]
        assert_same_bits(ours.state_dict(), plain.state_dict(), case.name)
        assert ours.state_dict()._metadata == plain.state_dict()._metadata
        assert list(ours.state_dict(prefix="x.")) == list(plain.state_dict(prefix="x."))


def test_wrap_keeps_every_name(engine: str) -> None:
    run_ranks(_wrap_keeps_names, 2, engine)


def _wrap_loads_both(rank: int, world_size: int, engine: str) -> None:
    case = CASES["cnn"]
    ours = fastddp.wrap(case.build(), engine=engine)
    source = case.build()
    with torch.no_grad():
        for k, tensor in enumerate([*source.parameters(), *source.buffers()]):
            tensor.fill_(k)
    plain = source.state_dict()
    spellings = {
        "plain": plain,
        "torch's class": TorchDDP(source).state_dict(),
        "our class": fastddp.DistributedDataParallel(source, engine=engine).state_dict(),
        "wrapped": fastddp.wrap(source, engine=engine).state_dict(),
    }
    assert list(spellings["torch's class"]) == _prefixed(plain)
    for spelling, state in spellings.items():
        with torch.no_grad():
            for tensor in [*ours.parameters(), *ours.buffers()]:
                tensor.zero_()
        keys = list(state)
        assert str(ours.load_state_dict(state)) == "<All keys matched successfully>", spelling
        assert_same_bits(ours.state_dict(), plain, spelling)
        assert list(state) == keys, "the caller's dictionary is left alone"
    # And what wrap saves loads anywhere.
    assert str(case.build().load_state_dict(ours.state_dict())) == "<All keys matched successfully>"

    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*conv1.weight"):
        ours.load_state_dict({})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"'):
        ours.load_state_dict({**plain, "other": torch.ones(1)})
    result = ours.load_state_dict({**plain, "other": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["other"])


def test_wrap_loads_either_spelling(engine: str) -> None:
    run_ranks(_wrap_loads_both, 2, engine)


class HasChildCalledModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def _child_called_module(rank: int, world_size: int, engine: str) -> None:
    """Its own keys begin with `module.`: they are no prefix to take away."""
    model = HasChildCalledModule()
    ours = fastddp.wrap(model, engine=engine)
    state = ours.state_dict()
    assert list(state) == ["module.weight", "module.bias"]
    other = {name: torch.full_like(tensor, 3.0) for name, tensor in state.items()}
    ours.load_state_dict(other)
    assert model.module.weight.unique().tolist() == [3.0]
    assert ours.module is model, "the original, as everywhere"
    loss_of(ours(torch.full((1, 2), float(rank)))).backward()
    assert_same_bits(gradients(ours), gradients(model), "same parameters")


def test_wrap_of_a_model_with_a_child_called_module(engine: str) -> None:
    run_ranks(_child_called_module, 2, engine)


def _custom_checkpoint(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.wrap(CustomCheckpoint(), engine=engine)
    assert list(ours.state_dict()) == ["old_name"]
    ours.load_state_dict({"old_name": torch.full((3,), 7.0)})
    assert ours.weight.tolist() == [7.0] * 3
    ours.load_state_dict({"module.old_name": torch.full((3,), 8.0)})
    assert ours.weight.tolist() == [8.0] * 3

    def drop_a(_module: nn.Module, state: Any, prefix: str, _metadata: Any) -> None:
        del state[prefix + "a"]

    hooked = Ladder()
    hooked.register_state_dict_post_hook(drop_a)
    hooked.register_state_dict_pre_hook(lambda module, *_: setattr(module, "saved", True))
    wrapped = fastddp.wrap(hooked, engine=engine)
    assert list(wrapped.state_dict()) == ["b", "c", "d", "e"]
    assert wrapped.saved is True


def test_wrap_honours_a_models_own_checkpoint_methods(engine: str) -> None:
    run_ranks(_custom_checkpoint, 2, engine)


def _hooks_through_the_wrapper(rank: int, world_size: int, engine: str) -> None:
    """A checkpoint hook on the wrapper is meant for the checkpoints that it makes and loads."""
    ours = fastddp.wrap(Ladder(), engine=engine)
    calls: list[str] = []

    def saved(_module: nn.Module, state: Any, prefix: str, _metadata: Any) -> None:
        state[prefix + "extra"] = torch.ones(1)

    def loading(_module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        calls.append("before")
        state.pop(prefix + "extra")

    ours.register_state_dict_pre_hook(lambda *_: calls.append("saving"))
    ours.register_state_dict_post_hook(saved)
    ours.register_load_state_dict_pre_hook(loading)
    ours.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    state = ours.state_dict()
    assert list(state) == [*Ladder.NAMES, "extra"]
    ours.load_state_dict(state)
    assert calls == ["saving", "before", "after"]
    outer = Outer(ours)
    assert "inner.extra" in outer.state_dict()
    outer.load_state_dict(outer.state_dict())


def test_checkpoint_hooks_registered_through_the_wrapper(engine: str) -> None:
    run_ranks(_hooks_through_the_wrapper, 2, engine)


class Outer(nn.Module):
    """A larger module with a wrapped one inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.inner = inner
        self.after = nn.Linear(2, 2)


def _nested(rank: int, world_size: int, engine: str) -> None:
    case = CASES["cnn"]
    plain = Outer(case.build())
    with torch.no_grad():
        for k, tensor in enumerate([*plain.parameters(), *plain.buffers()]):
            tensor.fill_(k)
    outer = Outer(fastddp.wrap(case.build(), engine=engine))
    for listing in ("named_parameters", "named_buffers", "named_modules"):
        got = [name for name, _ in getattr(outer, listing)()]
        assert got == [name for name, _ in getattr(plain, listing)()], listing
    assert list(outer.state_dict()) == list(plain.state_dict())
    outer.load_state_dict(plain.state_dict())
    assert_same_bits(outer.state_dict(), plain.state_dict(), "loaded from the plain one")

    # A checkpoint of the outer module in which torch's class was inside.
    with_torch = Outer(TorchDDP(plain.inner))
    with_torch.load_state_dict(
        {k.replace("inner.", "inner.module."): v + 1 for k, v in plain.state_dict().items()}
    )
    assert any(k.startswith("inner.module.") for k in with_torch.state_dict())
    want = {k.replace("inner.module.", "inner."): v for k, v in with_torch.state_dict().items()}
    outer.load_state_dict(with_torch.state_dict())
    assert_same_bits(outer.state_dict(), want, "loaded from one around torch's class")

    with_ours = Outer(fastddp.DistributedDataParallel(case.build(), engine=engine))
    assert list(with_ours.state_dict()) == list(with_torch.state_dict())
    with_ours.load_state_dict(with_torch.state_dict())
    assert_same_bits(with_ours.state_dict(), with_torch.state_dict(), "the class, nested")

    # A checkpoint hook of the inner model counts inside too.
    assert list(Outer(fastddp.wrap(Outer(nn.Linear(1, 1)), engine=engine)).state_dict()) == list(
        Outer(Outer(nn.Linear(1, 1))).state_dict()
    )


def test_wrapped_inside_a_larger_module(engine: str) -> None:
    run_ranks(_nested, 2, engine)


def _custom_nested(rank: int, world_size: int, engine: str) -> None:
    """The outer module saves its children one by one: the inner model's own method has to run."""
    outer = Outer(fastddp.wrap(CustomCheckpoint(), engine=engine))
    assert list(outer.state_dict()) == list(Outer(CustomCheckpoint()).state_dict())
    assert "inner.old_name" in outer.state_dict()
    assert "inner.weight" not in outer.state_dict()


def test_a_models_own_state_dict_counts_inside_a_larger_module(engine: str) -> None:
    run_ranks(_custom_nested, 2, engine)


# --- wrap: attributes and methods -----------------------------------------------------------------


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
    _assert_synchronises(ours, rank, world_size, "to the device it is on")
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
        _assert_synchronises(converted, rank, world_size, f"converted to {dtype}")
        assert {p.grad.dtype for p in converted.parameters()} == {dtype}
        before = fastddp.wrap(convert(Ladder()), engine=engine)
        _assert_synchronises(before, rank, world_size, f"{dtype} before")


def test_conversions_of_a_wrapped_model(engine: str) -> None:
    run_ranks(_conversions, 2, engine)


def _conversion_part_way(rank: int, world_size: int, engine: str) -> None:
    for make in (fastddp.wrap, fastddp.DistributedDataParallel):
        ours = make(Ladder(), engine=engine)
        _assert_synchronises(ours, rank, world_size, "before")
        ours.zero_grad()
        ours.double()
        _assert_synchronises(ours, rank, world_size, "after")
        assert {p.grad.dtype for p in ours.parameters()} == {torch.float64}


def test_conversion_after_the_first_steps(engine: str) -> None:
    run_ranks(_conversion_part_way, 2, engine)


# --- wrap: training with it -----------------------------------------------------------------------


def _optimizer(rank: int, world_size: int, engine: str) -> None:
    """Two training runs, one through torch's class and one through `wrap`, end at the same bits."""
    case = CASES["cnn"]
    theirs = TorchDDP(case.build())
    ours = fastddp.wrap(case.build(), engine=engine)
    runs = [(m, torch.optim.AdamW(m.parameters(), lr=0.01)) for m in (theirs, ours)]
    for step in range(4):
        for model, optimizer in runs:
            optimizer.zero_grad()
            loss_of(model(*case.inputs(rank, step))).backward()
            optimizer.step()
    want = {k.removeprefix("module."): v for k, v in theirs.state_dict().items()}
    assert_same_bits(ours.state_dict(), want, "after four steps")
    assert not torch.equal(ours.head.weight, case.build().head.weight), "it did learn"


def test_an_optimizer_made_from_wrapped_parameters(engine: str) -> None:
    run_ranks(_optimizer, 2, engine)


def _averaged_model(rank: int, world_size: int, engine: str) -> None:
    case = CASES["mlp"]
    for make in (fastddp.wrap, fastddp.DistributedDataParallel):
        ours = make(case.build(), engine=engine)
        average = AveragedModel(ours, avg_fn=lambda old, new, _: old + (new - old) / 4)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
        want = [p.detach().clone() for p in ours.parameters()]
        for step in range(3):
            optimizer.zero_grad()
            loss_of(ours(*case.inputs(rank, step))).backward()
            optimizer.step()
            average.update_parameters(ours)
            new = [p.detach() for p in ours.parameters()]
            want = [w + (n - w) / 4 if step else n.clone() for w, n in zip(want, new, strict=True)]
        for got, wanted, current in zip(
            average.module.parameters(), want, ours.parameters(), strict=True
        ):
            assert bits(got) == bits(wanted)
            assert bits(got) != bits(current)
        (x,) = case.inputs(0, 0)
        with torch.no_grad():
            assert torch.equal(average(x), average.module.module(x))


def test_averaged_models(engine: str) -> None:
    run_ranks(_averaged_model, 2, engine)


def _tied_after_wrapping(rank: int, world_size: int, engine: str) -> None:
    """One parameter under two names is one slot, and stays tied in a copy."""
    case = CASES["transformer"]
    ours = fastddp.wrap(case.build(), engine=engine)
    for model in (ours, copy.deepcopy(ours)):
        assert model.head.weight is model.embed.weight
        loss_of(model(*case.inputs(rank, 0))).backward()
        slots = [slot.param for bucket in model.plan().buckets for slot in bucket.slots]
        assert len(slots) == len(set(slots)) == len(list(model.parameters()))


def test_tied_parameters_stay_tied(engine: str) -> None:
    run_ranks(_tied_after_wrapping, 2, engine)


class OwnNames(nn.Module):
    """Uses names that torch's class has too."""

    def __init__(self) -> None:
        super().__init__()
        self.ladder = Ladder()
        self.device = "mine"

    def gather(self, x: int) -> int:
        return x + 1

    def join(self) -> str:
        return "joined"

    def forward(self, x: float) -> Tensor:
        return self.ladder(x) * (1 if self.device == "mine" and self.gather(1) == 2 else 0)


def _own_names(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.wrap(OwnNames(), engine=engine)
    assert ours.device == "mine"
    assert ours.gather(1) == 2
    assert ours.join() == "joined"
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.ladder, mean_x(0, world_size), "own names")


def test_a_models_own_names_win(engine: str) -> None:
    run_ranks(_own_names, 2, engine)


def _detached(rank: int, world_size: int, engine: str) -> None:
    """Dropping the wrapper frees the model: its gradients are then its own."""
    for make in (fastddp.wrap, fastddp.DistributedDataParallel):
        model = Ladder()
        ours = make(model, engine=engine)
        _assert_synchronises(ours, rank, world_size, "wrapped")
        del ours
        model.zero_grad()
        model(ladder_x(rank, 0, world_size)).backward()
        assert_ladder(model, ladder_x(rank, 0, world_size), "no longer wrapped")
        _assert_synchronises(make(model, engine=engine), rank, world_size, "wrapped again")


def test_dropping_the_wrapper_unhooks_the_model(engine: str) -> None:
    run_ranks(_detached, 2, engine)


def _frameworks(rank: int, world_size: int, engine: str) -> None:
    """What Lightning and Accelerate read and call, in their order, by torch's private names too."""
    for make in (fastddp.DistributedDataParallel, fastddp.wrap):
        ladder = Ladder()
        ours = make(ladder, engine=engine, find_unused_parameters=True)
        assert ours.find_unused_parameters is True
        assert ours.static_graph is False
        ours._set_static_graph()

        with ours.no_sync():  # Accelerate's trigger_sync_in_backward
            loss = ours(ladder_x(rank, 0, world_size))
            ours.require_backward_grad_sync = True
            ours.require_forward_param_sync = True
            ours.reducer.prepare_for_backward([])
            loss.backward()
            ours.require_backward_grad_sync = False
        assert_ladder(ladder, mean_x(0, world_size), "forward in no_sync, synchronised by hand")

        ours.zero_grad()  # Lightning's manual optimisation
        loss = ours(ladder_x(rank, 1, world_size))
        ours.reducer._rebuild_buckets()
        ours.reducer.prepare_for_backward([loss])
        loss.backward()
        ours.reducer._delay_all_reduce()
        assert_ladder(ladder, mean_x(1, world_size), "prepared by hand")

        data = ours._get_ddp_logging_data()
        assert data["world_size"] == world_size
        assert data["module_name"] == "Ladder"
        assert not data.get("can_set_static_graph"), "Lightning would advise it"


def test_what_frameworks_call(engine: str) -> None:
    run_ranks(_frameworks, 2, engine)


def test_convnet_is_the_cnn_case() -> None:
    """The tests above read its layers by name."""
    assert isinstance(CASES["cnn"].build(), ConvNet)
