"""A round that is captured into a graph: nothing waits, nothing is allocated, or it says why not.

The stand-in captures nothing; it only says that it does, which is what the engines go by.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastddp
from tests.ranks import run_ranks
from tests.streams import device
from tests.streams.group import RecordingGroup
from tests.streams.programs import SETTLED, Fragile, Trained


class Choosy(nn.Module):
    """Uses one of two layers, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 4, bias=False)
        self.seldom = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, with_seldom: bool) -> Tensor:
        y = self.always(x)
        return y + self.seldom(x) if with_seldom else y


def _wrapped(engine: str, **options: Any) -> tuple[fastddp.DistributedDataParallel, RecordingGroup]:
    device.load()
    group = RecordingGroup(size=4)
    model = Choosy().to(device.NAME)
    wrapped = fastddp.DistributedDataParallel(model, process_group=group, engine=engine, **options)
    return wrapped, group


def _backward(model: nn.Module, with_seldom: bool) -> list[str]:
    """Returns where the host waited."""
    loss = model(torch.ones(2, 4).to(device.NAME), with_seldom).sum()
    device.host_syncs()
    loss.backward()
    return [sync.where for sync in device.host_syncs()]


def _too_early(rank: int, world_size: int, engine: str) -> None:
    model, _group = _wrapped(engine)
    for _ in range(2):
        with device.capture(), pytest.raises(RuntimeError, match="in one of the first two"):
            _backward(model, True)
        assert _backward(model, True) != []
    assert model.module.always.weight.grad is not None
    with device.capture():
        assert _backward(model, True) == []


def test_a_capture_needs_two_rounds_before_it(engine: str) -> None:
    """The first has no buckets yet, and the second may get others than the first."""
    run_ranks(_too_early, 1, engine, init_group=False)


def _lazy(rank: int, world_size: int, engine: str) -> None:
    model, _group = _wrapped(engine, lazy_bucket_allocation=True)
    for _ in range(SETTLED):
        _backward(model, True)
    with device.capture(), pytest.raises(RuntimeError, match="lazy_bucket_allocation=True"):
        _backward(model, True)
    assert _backward(model, True) == []


def test_lazy_buckets_cannot_be_captured(engine: str) -> None:
    run_ranks(_lazy, 1, engine, init_group=False)


def _manual(rank: int, world_size: int, engine: str) -> None:
    """Backward and its finalization belong into one graph, or none."""
    model, _group = _wrapped(engine)
    for _ in range(SETTLED):
        _backward(model, True)
    model.require_manual_backward_finalization = True
    for _ in range(2):
        model.zero_grad()
        with device.capture():
            _backward(model, True)
        with pytest.raises(RuntimeError, match="within the same capture"):
            model.finalize_backward()
        with device.capture():
            model.finalize_backward()
            assert [sync.where for sync in device.host_syncs()] == []
        assert model.module.always.weight.grad is not None


def test_a_round_is_finalized_in_the_graph_it_is_in(engine: str) -> None:
    run_ranks(_manual, 1, engine, init_group=False)


def _outlived(rank: int, world_size: int, engine: str) -> None:
    device.load()
    trained = Trained(engine, Fragile())
    model = trained.model
    for _ in range(SETTLED):
        trained.backward()
    with device.capture():
        trained.backward()
    grads = [param.grad for param in model.parameters()]
    buckets = {StorageWeakRef(grad.untyped_storage()) for grad in grads}
    assert len(buckets) > 1
    grads.clear()
    model.module.breaks = True
    with pytest.raises(ArithmeticError):
        trained.backward()
    model.module.breaks = False
    model.zero_grad()
    trained.backward()
    now = {StorageWeakRef(param.grad.untyped_storage()) for param in model.parameters()}
    assert not now & buckets, "the test is about buckets that were replaced"
    assert not any(bucket.expired() for bucket in buckets), "a replay would write to freed memory"


def test_buckets_of_a_graph_are_never_freed(engine: str) -> None:
    run_ranks(_outlived, 1, engine, init_group=False)


def _steady(rank: int, world_size: int, engine: str, num_before: int) -> Any:
    model, _group = _wrapped(engine)
    for _ in range(num_before):
        _backward(model, True)
    buckets = model.plan()
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    with device.capture():
        assert _backward(model, True) == []
    assert model.plan() == buckets
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses
    assert len(device.findings()) == 0
    # What was put off is made up for when nothing is captured any more.
    for _ in range(2):
        _backward(model, True)
    assert model.module.always.weight.grad is not None
    return model.stats().rounds


@pytest.mark.parametrize("num_before", [2, 3])
def test_nothing_waits_in_a_captured_round(engine: str, num_before: int) -> None:
    assert run_ranks(_steady, 1, engine, num_before, init_group=False) == [num_before + 3]


def _unused(rank: int, world_size: int, engine: str) -> None:
    model, _group = _wrapped(engine)
    for _ in range(2):
        model.zero_grad()
        assert _backward(model, False) != [], "flags are read"
    assert model.module.seldom.weight.grad is None
    model.zero_grad()
    with device.capture():
        assert _backward(model, False) == []
    assert model.module.seldom.weight.grad is None, "as it was found in the round before"
    assert model.module.always.weight.grad is not None


def test_a_captured_round_goes_by_the_flags_that_were_read_last(engine: str) -> None:
    run_ranks(_unused, 1, engine, init_group=False)
