"""What `wrap` returns has the names of the model in checkpoints, also inside a larger module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import CASES, Ladder, loss_of
from tests.parity.checks import assert_same_bits, gradients
from tests.parity.wrapped import CustomCheckpoint, prefixed
from tests.ranks import run_ranks


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
    assert list(spellings["torch's class"]) == prefixed(plain)
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
