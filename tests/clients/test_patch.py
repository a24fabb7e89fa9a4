"""`fastddp.patch()`: constructing torch's class makes ours, inside a block and nowhere else."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP  # as clients import it
from torch.nn.parallel import distributed

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.ranks import run_ranks

CONSTRUCTOR = TorchDDP.__init__


class UsersDDP(TorchDDP):
    pass


def _is_ours(model: object) -> bool:
    return type(model) is fastddp.DistributedDataParallel


def _in_thread(call: Callable[[], Any]) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(30)
    return results[0]


# ---- what is constructed -------------------------------------------------------------------------


def _constructs(rank: int, world_size: int) -> None:
    torchs = TorchDDP(Ladder())
    with fastddp.patch():
        for name in (
            TorchDDP,
            torch.nn.parallel.DistributedDataParallel,
            distributed.DistributedDataParallel,
        ):
            ladder = Ladder()
            model = name(ladder, find_unused_parameters=True, bucket_cap_mb=1)
            assert _is_ours(model)
            assert isinstance(model, name)
            assert model.module is ladder
            assert model.find_unused_parameters is True
        assert isinstance(torchs, TorchDDP)
        assert not isinstance(torchs, fastddp.DistributedDataParallel)
        assert not isinstance(UsersDDP(Ladder()), fastddp.DistributedDataParallel)
        assert _is_ours(fastddp.DistributedDataParallel(Ladder()))
        assert isinstance(fastddp.wrap(Ladder()), fastddp.DistributedDataParallel)
        with pytest.raises(ValueError, match="mixed_precision"):
            TorchDDP(Ladder(), mixed_precision=object())
        assert type(TorchDDP(Ladder(), process_group=None)) is fastddp.DistributedDataParallel
    assert type(TorchDDP(Ladder())) is TorchDDP

    for step in range(3):  # the one made inside goes on after the block
        model.zero_grad()
        model(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ladder, mean_x(step, world_size), f"step {step}")
    assert model.stats().rounds == 3


def test_every_name_constructs_ours() -> None:
    run_ranks(_constructs, 2)


def _copies(rank: int, world_size: int) -> None:
    torchs, ours = TorchDDP(nn.Linear(2, 2)), fastddp.DistributedDataParallel(nn.Linear(2, 2))
    with fastddp.patch():
        for model in (torchs, ours):
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            for made in (
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(file, weights_only=False),
            ):
                assert type(made) is type(model)
                made(torch.ones(1, 2)).sum().backward()


def test_copies_keep_their_class() -> None:
    run_ranks(_copies, 2)


def _torch_replicate(rank: int, world_size: int) -> None:
    """Torch's `replicate()` runs the model itself, between the halves of the wrapper's forward."""
    from torch.distributed._composable import replicate

    ladder = Ladder()
    model = replicate(ladder)
    with fastddp.patch():
        for step in range(3):
            model.zero_grad()
            model(ladder_x(rank, step, world_size)).backward()
            assert_ladder(ladder, mean_x(step, world_size), f"step {step}")
        model.set_requires_gradient_sync(False)
        model.zero_grad()
        model(ladder_x(rank, 0, world_size)).backward()
        assert_ladder(ladder, ladder_x(rank, 0, world_size), "not synchronised")
    assert _is_ours(replicate.state(model)._ddp_weakref())

    half = distributed._MixedPrecision(param_dtype=torch.float16)
    with fastddp.patch(), pytest.raises(NotImplementedError, match="mixed_precision needs"):
        replicate(nn.Linear(2, 2), mixed_precision=half)(torch.ones(1, 2))


def test_replicate_trains_through_ours() -> None:
    run_ranks(_torch_replicate, 2)


# ---- where ---------------------------------------------------------------------------------------


def test_the_constructor_is_restored() -> None:
    signature, names = inspect.signature(TorchDDP), set(vars(TorchDDP))
    block = fastddp.patch()
    assert TorchDDP.__init__ is CONSTRUCTOR
    for _ in range(2):
        with block, block, fastddp.patch():
            assert TorchDDP.__init__ is not CONSTRUCTOR
            assert inspect.signature(TorchDDP) == signature
            assert TorchDDP.__init__.__doc__ == CONSTRUCTOR.__doc__
        assert TorchDDP.__init__ is CONSTRUCTOR
        assert set(vars(TorchDDP)) == names
    with pytest.raises(ValueError, match="process group"), block:
        TorchDDP(nn.Linear(2, 2))
    assert TorchDDP.__init__ is CONSTRUCTOR


def _nested(rank: int, world_size: int) -> None:
    block = fastddp.patch()
    with block:
        with block:
            pass
        assert _is_ours(TorchDDP(Ladder())), "the inner block's end is not the outer one's"

    @fastddp.patch()
    def make(depth: int) -> Any:
        """Docs."""
        return make(depth - 1) if depth else TorchDDP(Ladder())

    assert make.__doc__ == "Docs."
    assert not _is_ours(TorchDDP(Ladder()))
    assert _is_ours(make(2))
    assert not _is_ours(TorchDDP(Ladder()))


def test_blocks_nest_and_decorate() -> None:
    run_ranks(_nested, 1)


def _threads(rank: int, world_size: int) -> None:
    other_opened, first_closed = threading.Event(), threading.Event()

    def other() -> bool:
        with fastddp.patch():
            other_opened.set()
            assert first_closed.wait(30)
            return _is_ours(TorchDDP(Ladder()))

    results = []
    thread = threading.Thread(target=lambda: results.append(other()))
    with fastddp.patch():
        assert not _in_thread(lambda: _is_ours(TorchDDP(Ladder()))), "a block is its own thread's"
        thread.start()
        assert other_opened.wait(30)
    assert not _is_ours(TorchDDP(Ladder())), "another thread's block is open"
    first_closed.set()
    thread.join(30)
    assert results == [True], "another thread's block was closed first"
    assert TorchDDP.__init__ is CONSTRUCTOR


def test_a_block_is_its_own_threads() -> None:
    run_ranks(_threads, 1)


def _wrapped_by_another(rank: int, world_size: int) -> None:
    calls = []
    with fastddp.patch():
        inner = TorchDDP.__init__

        def theirs(self: TorchDDP, *args: Any, **kwargs: Any) -> None:
            calls.append(type(self))
            inner(self, *args, **kwargs)

        TorchDDP.__init__ = theirs  # type: ignore[method-assign]
    assert TorchDDP.__init__ is theirs
    assert type(TorchDDP(Ladder())) is TorchDDP
    with fastddp.patch():
        assert _is_ours(TorchDDP(Ladder()))
    assert TorchDDP.__init__ is theirs
    assert type(TorchDDP(Ladder())) is TorchDDP
    assert calls == [TorchDDP] * 2


def test_a_constructor_that_another_tool_wraps_meanwhile_stays() -> None:
    run_ranks(_wrapped_by_another, 1)


def test_a_forgotten_with_is_told() -> None:
    with pytest.warns(RuntimeWarning, match="with fastddp.patch"):
        fastddp.patch()
    assert TorchDDP.__init__ is CONSTRUCTOR
