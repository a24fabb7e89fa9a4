"""What a step leaves in the ring of events, with either engine."""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from fastddp.watch import events
from fastddp.watch.events import Kind
from tests.ranks import run_ranks

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}
OF_SHARED_MEMORY = (Kind.COLLECTIVE_BEGIN, Kind.COLLECTIVE_MET, Kind.COLLECTIVE_END)


class Event(NamedTuple):
    kind: Kind
    owner: int
    a: int
    b: int


def _recorded() -> list[Event]:
    """Returns the events so far, of which there are few."""
    assert events._ring is not None
    content = events._ring.copy()
    words = struct.unpack(f"<{len(content) // 8}Q", content)
    found = []
    for at in range(16, 16 + 4 * words[2], 4):
        what, a, b = words[at + 1 : at + 4]
        found.append(Event(Kind(what & 0xFF), what >> 32, a, b))
    return found


class _Net(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=sparse)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.body(self.words(numbers)).sum()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.tensor([1, 2])).backward()
    optimizer.step()


def _wrapped(engine: str, sparse: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = fastddp.wrap(_Net(sparse), engine=engine, bucket_cap_mb=1e-5)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _third_step(rank: int, world_size: int, engine: str) -> tuple[list[Event], int, int]:
    model, optimizer = _wrapped(engine)
    for _ in range(2):
        _step(model, optimizer)
    before = len(_recorded())
    _step(model, optimizer)
    owner = model._replica.model.owner.number
    return _recorded()[before:], owner, model.stats().bytes_per_round


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_step_is_recorded_in_order(engine: str, transport: str) -> None:
    for found, owner, num_bytes in run_ranks(_third_step, 2, engine, env=TRANSPORTS[transport]):
        of_step = [event for event in found if event.kind not in OF_SHARED_MEMORY]
        assert all(event.owner == owner for event in of_step if event.kind <= Kind.ROUND_END)
        kinds = [event.kind for event in of_step]
        assert kinds[:3] == [Kind.FORWARD_BEGIN, Kind.FORWARD_END, Kind.ROUND_BEGIN]
        assert kinds[-3:] == [Kind.ROUND_END, Kind.OPTIMIZER_BEGIN, Kind.OPTIMIZER_END]
        assert [of_step[at].a for at in (0, 2, -3)] == [2, 2, 2], "two rounds have ended before"
        ways = [event for event in of_step[3:-3] if event.kind is not Kind.BACKWARD_END]
        launches = [event for event in ways if event.kind is Kind.LAUNCH]
        count = len(launches)
        assert count > 2
        assert [(event.kind, event.a) for event in ways] == [
            *((kind, n) for n in range(count) for kind in (Kind.FILL_BEGIN, Kind.LAUNCH)),
            *((kind, n) for n in range(count) for kind in (Kind.WAIT_BEGIN, Kind.WAIT_END)),
        ]
        assert sum(event.b for event in launches) == num_bytes
        assert kinds.count(Kind.BACKWARD_END) == 1
        assert kinds.index(Kind.BACKWARD_END) < kinds.index(Kind.WAIT_BEGIN)
        _check_collectives(found, launches if transport == "shm" else [])


def _check_collectives(found: list[Event], launches: list[Event]) -> None:
    begun, met, ended = (
        [event for event in found if event.kind is kind] for kind in OF_SHARED_MEMORY
    )
    if not launches:
        assert begun == met == ended == []
        return
    assert [event.a for event in begun] == [event.a for event in met] == [e.a for e in ended]
    assert {event.a >> 32 for event in begun} != {0}, "the group's id"
    numbers = [event.a & 0xFFFFFFFF for event in begun]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    all_reduce = 1
    assert [event.b for event in begun][: len(launches)] == [
        event.b | all_reduce << 56 for event in launches
    ]
    assert {event.owner for event in begun} == {launches[0].owner}
    assert {event.b >> 40 for event in met} <= {0, 1}


def _one_way(rank: int, world_size: int, engine: str, way: str) -> list[Event]:
    model, optimizer = _wrapped(engine, sparse=way == "sparse")
    if way == "hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model.register_comm_hook(None, allreduce_hook)
    model.require_manual_backward_finalization = way == "manual"
    before = len(_recorded())
    for _ in range(3):
        if way == "no_sync":
            with model.no_sync():
                model(torch.tensor([1, 2])).backward()
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).backward()
        if way == "manual":
            model.finalize_backward()
        if way == "unused":
            model.body[0].requires_grad_(False)
            model.module.words(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    return _recorded()[before:]


@pytest.mark.parametrize("way", ["plain", "sparse", "hook", "manual", "no_sync", "unused"])
def test_both_engines_leave_the_same(way: str) -> None:
    native, python = (
        run_ranks(_one_way, 2, engine, way, env=TRANSPORTS["gloo"])[0]
        for engine in ("native", "python")
    )
    assert native == python
    num_rounds = sum(event.kind is Kind.ROUND_BEGIN for event in python)
    assert num_rounds == sum(event.kind is Kind.ROUND_END for event in python) > 2


def _raising(rank: int, world_size: int, engine: str) -> tuple[list[Event], list[Event]]:
    model, optimizer = _wrapped(engine)
    for _ in range(2):
        _step(model, optimizer)

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("no gradient today")

    handle = model.module.words.weight.register_hook(fail)
    before = len(_recorded())
    with pytest.raises(ArithmeticError):
        model(torch.tensor([1, 2])).backward()
    in_backward = _recorded()[before:]
    handle.remove()
    dist.barrier()
    before = len(_recorded())
    with pytest.raises(RuntimeError, match="no gradients are in flight"):
        model.finalize_backward()
    return in_backward, _recorded()[before:]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_error_is_recorded(engine: str, transport: str) -> None:
    for in_backward, in_call in run_ranks(_raising, 2, engine, env=TRANSPORTS[transport]):
        kinds = [event.kind for event in in_backward if event.kind not in OF_SHARED_MEMORY]
        assert kinds.count(Kind.ERROR) == 1
        assert kinds.index(Kind.ROUND_BEGIN) < kinds.index(Kind.ERROR) < len(kinds) - 1
        assert kinds[-1] is Kind.ROUND_END
        assert Kind.BACKWARD_END not in kinds
        (error,) = in_call
        assert error.kind is Kind.ERROR
        assert error.owner == in_backward[0].owner != 0


def _late(rank: int, world_size: int, engine: str) -> list[Event]:
    model, optimizer = _wrapped(engine)
    for _ in range(3):
        _step(model, optimizer)
    dist.barrier()
    before = len(_recorded())
    if rank == 1:
        time.sleep(0.3)
    _step(model, optimizer)
    return [event for event in _recorded()[before:] if event.kind is Kind.COLLECTIVE_MET]


def test_a_late_rank_is_named(engine: str) -> None:
    for met in run_ranks(_late, 2, engine, env=TRANSPORTS["shm"]):
        assert met[0].b >> 40 == 1
        assert met[0].b & (1 << 40) - 1 >= 0.2e9


def _alone(rank: int, world_size: int, engine: str) -> list[Event]:
    model, optimizer = _wrapped(engine)
    _step(model, optimizer)
    with torch.no_grad():
        model(torch.tensor([1, 2]))
    return _recorded()


def test_a_world_of_one_records_what_there_is(engine: str) -> None:
    forward = [Kind.FORWARD_BEGIN, Kind.FORWARD_END]
    optimizer = [Kind.OPTIMIZER_BEGIN, Kind.OPTIMIZER_END]
    (found,) = run_ranks(_alone, 1, engine)
    assert [event.kind for event in found] == [*forward, *optimizer, *forward]
