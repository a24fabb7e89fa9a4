"""Torch's checkpoint API: the same keys and values as with torch's class, whoever wraps."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as api
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.ranks import run_ranks, scratch_folder


class Model(nn.Module):
    """Parameters at the root and below, a frozen one, tied ones, buffers of both sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.block = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.tied(self.frozen(self.block(x))) * self.scale


class Outer(nn.Module):
    """A larger module around a wrapped one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.inner(x))


Trained = tuple[nn.Module, torch.optim.Optimizer]
Make = Callable[[nn.Module], nn.Module]


def _trained(make: Make, seed: int) -> Trained:
    torch.manual_seed(seed)
    model = make(Model())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        # The same on all ranks, for a checkpoint has one rank's buffers.
        x = torch.arange(8.0).reshape(4, 2) + step * seed
        model(x).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _makers(engine: str) -> dict[str, Make]:
    """Torch's first, at the top of the model and inside a larger one."""

    def wrap(model: nn.Module) -> nn.Module:
        return fastddp.wrap(model, engine=engine)

    def cls(model: nn.Module) -> nn.Module:
        return fastddp.DistributedDataParallel(model, engine=engine)

    return {"torch": TorchDDP, "wrap": wrap, "class": cls}


def _inside(place: Make, make: Make) -> Make:
    return lambda model: place(make(model))


def _flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Spreads nested dictionaries and lists out, to compare them by key."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, (dict, list)):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _assert_equal(got: Any, want: Any, what: object) -> None:
    got, want = _flat(got), _flat(want)
    assert got.keys() == want.keys(), what
    for key, value in want.items():
        if isinstance(value, Tensor):
            assert torch.allclose(got[key], value), (what, key, got[key], value)
        else:
            assert got[key] == value, (what, key)


_FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
_OPTIONS = {
    "default": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "on rank 0's host": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "offloaded": StateDictOptions(cpu_offload=True),
    "without frozen": StateDictOptions(ignore_frozen_params=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def _reads_as_torch(rank: int, world_size: int, engine: str) -> None:
    for place in (lambda m: m, Outer):
        trained = {
            name: _trained(_inside(place, make), 1) for name, make in _makers(engine).items()
        }
        theirs, their_optimizer = trained.pop("torch")
        for name, (ours, optimizer) in trained.items():
            for option, options in _OPTIONS.items():
                what = (name, place, option)
                want = api.get_state_dict(theirs, their_optimizer, options=options)
                got = api.get_state_dict(ours, optimizer, options=options)
                if place is not Outer or name == "class":
                    assert not any("module" in key for key in got[0]), what
                for one, other in zip(got, want, strict=True):
                    _assert_equal(one, other, what)
                _assert_equal(api.get_model_state_dict(ours, options=options), want[0], what)
                _assert_equal(
                    api.get_optimizer_state_dict(ours, optimizer, options=options), want[1], what
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # parts of a model: deprecated
            blocks = [
                api.get_model_state_dict(m, submodules={next(_blocks(m)), next(_heads(m))})
                for m in (theirs, trained["wrap"][0], trained["class"][0])
            ]
        assert len(blocks[0]) == 8
        _assert_equal(blocks[1], blocks[0], "submodules, wrap")
        _assert_equal(blocks[2], blocks[0], "submodules, class")


def _blocks(model: nn.Module) -> Any:
    return (m for m in model.modules() if isinstance(m, nn.Sequential))


def _heads(model: nn.Module) -> Any:
    return (m for name, m in model.named_modules() if name.endswith("head"))


def test_state_dicts_are_those_of_torch(engine: str) -> None:
    run_ranks(_reads_as_torch, 2, engine)


def _writes_as_torch(rank: int, world_size: int, engine: str) -> None:
    """What any of them gave any of them takes, and trains on alike."""
    makers = _makers(engine)
    source = _trained(makers["torch"], 1)
    want = api.get_state_dict(*source)
    from_rank_0: Any = None
    for name, make in makers.items():
        model, optimizer = _trained(make, 2)
        # Values of its own: what is loaded may become the model's.
        given = api.get_state_dict(*_trained(make, 1))
        result = api.set_state_dict(
            model, optimizer, model_state_dict=given[0], optim_state_dict=given[1]
        )
        assert (result.missing_keys, result.unexpected_keys) == ([], []), name
        for got, part in zip(api.get_state_dict(model, optimizer), want, strict=True):
            _assert_equal(got, part, name)

        # Rank 0 alone has the values.
        model, optimizer = _trained(make, 3)
        options = _FROM_RANK_0
        given = api.get_state_dict(*_trained(make, 1))
        states = given if rank == 0 else ({}, {})
        api.set_model_state_dict(model, states[0], options=options)
        api.set_optimizer_state_dict(model, optimizer, states[1], options=options)
        got = api.get_state_dict(model, optimizer)
        _assert_equal(got[0], want[0], (name, "from rank 0"))
        # Torch turns some of an optimizer's settings into others on this way.
        from_rank_0 = from_rank_0 or got[1]
        _assert_equal(got[1], from_rank_0, (name, "from rank 0"))

        # Without the frozen ones.
        partial = api.get_model_state_dict(
            source[0], options=StateDictOptions(ignore_frozen_params=True)
        )
        api.set_model_state_dict(model, partial, options=StateDictOptions(strict=False))
        x = torch.arange(8.0).reshape(4, 2) * (rank + 1)
        model(x).square().sum().backward()
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        both = [torch.empty_like(grads) for _ in range(world_size)]
        dist.all_gather(both, grads)
        assert torch.equal(*both), "it goes on averaging"


def test_state_dicts_go_from_any_to_any(engine: str) -> None:
    run_ranks(_writes_as_torch, 2, engine)


def _saves_and_loads(rank: int, world_size: int, engine: str) -> None:
    makers = _makers(engine)
    want = api.get_state_dict(*_trained(makers["torch"], 1))
    for saver in makers:
        folder = f"{scratch_folder()}/{saver}"
        model, optimizer = _trained(makers[saver], 1)
        states = api.get_state_dict(model, optimizer)
        save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
        for loader in makers:
            if "torch" == saver == loader:
                continue
            model, optimizer = _trained(makers[loader], 2)
            states = api.get_state_dict(model, optimizer)
            load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
            api.set_state_dict(
                model, optimizer, model_state_dict=states[0], optim_state_dict=states[1]
            )
            for got, part in zip(api.get_state_dict(model, optimizer), want, strict=True):
                _assert_equal(got, part, (saver, loader))

    # The objects themselves, in the background too.
    folder = f"{scratch_folder()}/objects"
    model, _ = _trained(makers["wrap"], 1)
    saving: Any = async_save({"model": model}, checkpoint_id=folder)
    saving.result()
    model, _ = _trained(makers["wrap"], 2)
    load({"model": model}, checkpoint_id=folder)
    _assert_equal(dict(model.state_dict()), want[0], "by itself")


def test_checkpoints_go_from_any_to_any(engine: str) -> None:
    run_ranks(_saves_and_loads, 2, engine)


class WithExtraState(nn.Sequential):
    """Has state that is no parameter or buffer."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def _extra_state(rank: int, world_size: int, engine: str) -> None:
    for name, make in _makers(engine).items():
        for options in _OPTIONS["default"], _OPTIONS["full"], _FROM_RANK_0:
            model = make(WithExtraState(nn.Linear(2, 2)))
            model.module.extra = torch.full((2,), 5.0)
            state = api.get_model_state_dict(model)
            assert set(state) == {"0.weight", "0.bias", "_extra_state"}, name
            model.module.extra = None
            given = {} if options is _FROM_RANK_0 and rank > 0 else state
            api.set_model_state_dict(model, given, options=options)
            assert model.module.extra.tolist() == [5.0, 5.0], (name, options)
            assert model.module[0] is next(model.module.children())
    wrapped = fastddp.wrap(WithExtraState(nn.Linear(2, 2)), engine=engine)
    wrapped.set_extra_state(7)
    copied = pickle.loads(pickle.dumps(wrapped))
    assert (copied.get_extra_state(), len(copied)) == (7, 1)


def test_state_that_is_no_tensor(engine: str) -> None:
    run_ranks(_extra_state, 2, engine)


def _is_torchs_everywhere_else(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(Model(), engine=engine)
    api.get_model_state_dict(model)
    assert isinstance(model, TorchDDP)
    assert isinstance(TorchDDP(Model()), vars(api)["DDP"]), "which does have the prefix"
    assert issubclass(type(model), nn.parallel.DistributedDataParallel)


def test_only_the_checkpoint_api_tells_them_apart(engine: str) -> None:
    run_ranks(_is_torchs_everywhere_else, 2, engine)
