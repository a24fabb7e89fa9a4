"""What acts before, in and after a backward: buffer hooks, optimizers in backward, unfreezing."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import (
    hook_with_zero_step,
    hook_with_zero_step_interleaved,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.nn.parallel.distributed import _BufferCommHookLocation

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, bits, digest, wrap_small
from tests.ranks import run_ranks


def _build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def _inputs(rank: int, step: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * step + rank))


# --- buffers --------------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: float) -> Tensor:
        self.seen += x
        return self.weight * x


def _buffer_hook(rank: int, world_size: int, engine: str, before: bool, later: bool) -> None:
    def add_up(state: list[str], buffers: dict[str, Tensor]) -> list[torch.futures.Future] | None:
        state += buffers
        if later:
            return [dist.all_reduce(b, async_op=True).get_future() for b in buffers.values()]
        for buffer in buffers.values():
            dist.all_reduce(buffer)
        return None

    model = fastddp.DistributedDataParallel(Counter(), engine=engine)
    names: list[str] = []
    location = (
        _BufferCommHookLocation.PRE_FORWARD if before else _BufferCommHookLocation.POST_FORWARD
    )
    model._register_buffer_comm_hook(names, add_up, location)
    want = 0.0
    for step in range(3):
        if before and not later:
            want *= world_size
        model(float(rank + 1)).backward()
        if before and not later:
            want += rank + 1
            assert model.module.seen == want if step == 0 else True
        elif not before:
            want = (want * world_size) + sum(range(1, world_size + 1))
            assert model.module.seen == want, step
    assert names == ["seen"] * 3


@pytest.mark.parametrize(("before", "later"), [(True, False), (False, False), (False, True)])
def test_a_hook_for_buffers(engine: str, before: bool, later: bool) -> None:
    run_ranks(_buffer_hook, 2, engine, before, later)


# --- optimizers in backward -----------------------------------------------------------------------


def _in_backward(rank: int, world_size: int, engine: str, when: str) -> str:
    plain = fastddp.wrap(_build(), engine=engine)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    model = _build()
    kwargs = {"lr": 0.1, "momentum": 0.9}
    if when == "before":
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), kwargs)
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    if when == "after":
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), kwargs)
    for step in range(3):
        optimizer.zero_grad()
        plain(_inputs(rank, step)).square().sum().backward()
        optimizer.step()
        ours(_inputs(rank, step)).square().sum().backward()
        assert all(p.grad is None for p in model.parameters()), "left for nobody"
        assert_same_bits(model.state_dict(), plain.state_dict(), f"step {step}")
    return digest(model.state_dict())


@pytest.mark.parametrize("when", ["before", "after"])
def test_optimizers_that_parameters_brought_along(engine: str, when: str) -> None:
    assert len(set(run_ranks(_in_backward, 2, engine, when))) == 1


def _fused(rank: int, world_size: int, engine: str) -> None:
    ours, theirs = wrap_small(_build(), engine), TorchDDP(_build())
    for model in (ours, theirs):
        model._register_fused_optim(torch.optim.SGD, 0.1, momentum=0.9)
        for step in range(4):
            model(_inputs(rank, step)).square().sum().backward()
            model.zero_grad()
    assert_same_bits(ours.state_dict(), theirs.state_dict(), "after four steps")
    assert not torch.equal(next(ours.parameters()), next(_build().parameters()))


def test_fused_optimizers(engine: str) -> None:
    run_ranks(_fused, 2, engine)


def _zero_overlap(rank: int, world_size: int, engine: str, interleaved: bool) -> str:
    """Torch refuses this on gloo, where it can hang; ours gives a hook one bucket at a time."""
    make = hook_with_zero_step_interleaved if interleaved else hook_with_zero_step
    model = wrap_small(_build(), engine)
    zero = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1, momentum=0.9
    )
    with mock.patch("torch.distributed.get_backend", return_value="nccl"):
        hook = make(allreduce_hook, model, zero)
    model.register_comm_hook(None, hook)
    plain = fastddp.wrap(_build(), engine=engine)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    num_steps = 0
    for step in range(6):  # the hook spends its first rounds on learning the buckets
        before = digest(dict(model.module.state_dict()))
        model.zero_grad()
        model(_inputs(rank, step)).square().sum().backward()
        if digest(dict(model.module.state_dict())) == before:
            continue
        num_steps += 1
        optimizer.zero_grad()
        plain(_inputs(rank, step)).square().sum().backward()
        optimizer.step()
        assert_same_bits(dict(model.module.state_dict()), dict(plain.state_dict()), f"step {step}")
    assert num_steps == 4
    return digest(dict(model.module.state_dict()))


@pytest.mark.parametrize("interleaved", [False, True])
def test_zero_steps_while_backward_goes_on(engine: str, interleaved: bool) -> None:
    assert len(set(run_ranks(_zero_overlap, 2, engine, interleaved))) == 1


# --- freezing and unfreezing ----------------------------------------------------------------------


def _thawing(rank: int, world_size: int, engine: str) -> None:
    ladder = Ladder()
    ladder.requires_grad_(False)
    ladder.c.requires_grad_(True)
    model = wrap_small(ladder, engine)
    for step, trained in enumerate(("c", "c", "abc", "abc", "de", "abcde", "c", "de", "abcde")):
        for name in Ladder.NAMES:
            model.module.get_parameter(name).requires_grad_(name in trained)
        model.zero_grad()
        model(ladder_x(rank, step, world_size)).backward()
        mean = mean_x(step, world_size)
        want = {name: mean if name in trained else None for name in Ladder.NAMES}
        assert_ladder(model.module, want, (step, trained))


def test_parameters_are_frozen_and_thawed_after_wrapping(engine: str) -> None:
    run_ranks(_thawing, 2, engine)


def _thawed_with_hook(rank: int, world_size: int, engine: str) -> None:
    ladder = Ladder()
    ladder.a.requires_grad_(False)
    model = fastddp.wrap(ladder, engine=engine)
    model.register_comm_hook(None, allreduce_hook)
    model(ladder_x(rank, 0, world_size)).backward()
    ladder.a.requires_grad_(True)
    model.zero_grad()
    model(ladder_x(rank, 1, world_size)).backward()
    assert_ladder(model, mean_x(1, world_size), "thawed")


def test_a_hook_survives_thawing(engine: str) -> None:
    run_ranks(_thawed_with_hook, 2, engine)


# --- what is logged, once -------------------------------------------------------------------------


def _logged(rank: int, world_size: int, engine: str) -> list[str]:
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("fastddp").addHandler(Keep())
    model = fastddp.wrap(Ladder(), engine=engine)
    for step in range(3):
        model.zero_grad()
        used = "ab" if rank == 0 else "ad"
        model(ladder_x(rank, step, world_size), used).backward()
        assert bits(model.e.grad) is None
    return messages


def test_names_of_unused_parameters_are_logged_once_by_one_rank(engine: str) -> None:
    first, second = run_ranks(_logged, 2, engine)
    assert second == []
    assert len(first) == 1
    assert "2 parameters" in first[0]
    assert first[0].endswith(("e, c", "c, e"))


# --- another group --------------------------------------------------------------------------------


def _moved(rank: int, world_size: int, engine: str) -> None:
    alone = [dist.new_group([r]) for r in range(world_size)]
    pair = dist.new_group([0, 1])
    model = fastddp.DistributedDataParallel(Ladder(), engine=engine)
    x = ladder_x(rank, 0, world_size)
    model._update_process_group(alone[rank])
    model(x).backward()
    assert_ladder(model.module, x, "alone")
    model._update_process_group(pair)  # on rank 2 it is no group: nothing happens
    for step in range(2):
        model.zero_grad()
        model(ladder_x(rank, step, 2)).backward()
        want = mean_x(step, 2) if rank < 2 else ladder_x(rank, step, 2)
        assert_ladder(model.module, want, f"pair, step {step}")


def test_the_group_can_be_replaced(engine: str) -> None:
    run_ranks(_moved, 3, engine)
