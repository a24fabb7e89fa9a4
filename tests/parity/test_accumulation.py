"""Several forwards and backwards add up on every rank as they do on one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, digest, gradients, wrap_small
from tests.parity.scenarios import Scenarios, wrapped_ladder
from tests.ranks import run_ranks
from tests.slow import slow_but_for

SCENARIOS = Scenarios()


@SCENARIOS
def several_forwards_before_one_backward(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        losses = [ours(ladder_x(rank, step + k, world_size), used="abcde"[k:]) for k in range(3)]
        torch.stack(losses).sum().backward()
        m = [mean_x(step + k, world_size) for k in range(3)]
        want = {"a": m[0], "b": m[0] + m[1], **dict.fromkeys("cde", sum(m))}
        assert_ladder(ours.module, want, step)
    assert ours.stats().rounds == 3, "one backward is one round, whatever the forwards"


@SCENARIOS
def several_backwards_before_zero_grad(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    total = 0.0
    for step in range(5):
        ours(ladder_x(rank, step, world_size)).backward()
        total += mean_x(step, world_size)
        assert_ladder(ours.module, total, step)


@SCENARIOS
def one_graph_backward_twice(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    loss = ours(ladder_x(rank, 2, world_size))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_ladder(ours.module, 2 * mean_x(2, world_size), "twice")


@SCENARIOS
def gradients_may_be_changed_in_place(rank: int, world_size: int, engine: str) -> None:
    """As clipping and unscaling do."""
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        for p in ours.parameters():
            p.grad.mul_(4)
        ours(ladder_x(rank, step + 1, world_size)).backward()
        assert_ladder(
            ours.module, 4 * mean_x(step, world_size) + mean_x(step + 1, world_size), step
        )


@SCENARIOS
def zero_grad_of_either_kind(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step, set_to_none in enumerate((False, True, False, False, True, True)):
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)
        ours.zero_grad(set_to_none=set_to_none)
        assert_ladder(ours.module, None if set_to_none else 0.0, step)


@SCENARIOS
def gradients_may_be_the_users_own_tensors(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(4):
        for name, p in ours.module.named_parameters():
            p.grad = torch.full_like(p, float(6 * Ladder.factor(name)) if step % 2 else 0.0)
        ours(ladder_x(rank, step, world_size)).backward()
        want = mean_x(step, world_size) + (6 if step % 2 else 0)
        assert_ladder(ours.module, want, step)


@SCENARIOS
def users_tensors_may_have_other_strides(rank: int, world_size: int, engine: str) -> None:
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        ours.module.b.grad = torch.full((2, 2), 12.0).t()
        ours.module.d.grad = torch.full((5, 2), 24.0)[:, 0]
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        assert_ladder(ours.module, dict.fromkeys("ace", m) | dict.fromkeys("bd", m + 6), step)


@SCENARIOS
def autograd_grad_neither_synchronises_nor_disturbs(
    rank: int, world_size: int, engine: str
) -> None:
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        x = ladder_x(rank, step, world_size)
        grads = torch.autograd.grad(ours(x), list(ours.parameters()))
        assert [g.unique().tolist() for g in grads] == [[x * k] for k in range(1, 6)]
        assert_ladder(ours.module, None, "autograd.grad leaves .grad alone")
        ours(x).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)
    assert ours.stats().rounds == 3


@SCENARIOS
def backward_with_inputs(rank: int, world_size: int, engine: str) -> None:
    """`backward(inputs=...)` reaches some parameters only: the others are unused ones."""
    ours = wrapped_ladder(engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward(inputs=[ours.module.b, ours.module.e])
        m = mean_x(step, world_size)
        assert_ladder(ours.module, {"a": None, "b": m, "c": None, "d": None, "e": m}, step)


def _accumulate_beside_torch(rank: int, world_size: int, name: str, engine: str) -> list[str]:
    case = CASES[name]
    ours = wrap_small(case.build(), engine)
    theirs = TorchDDP(case.build(), find_unused_parameters=case.has_unused)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (ours, theirs)]
    digests = []
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=step != 1)
            with model.no_sync():
                for micro in range(2):
                    loss_of(model(*case.inputs(rank, 10 * step + micro))).backward()
            loss_of(model(*case.inputs(rank, 10 * step + 2))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
            optimizer.step()
        assert_same_bits(gradients(ours.module), gradients(theirs.module), f"{name}, {step}")
        assert_same_bits(ours.state_dict(), theirs.state_dict(), f"{name}, {step}")
        digests.append(digest(gradients(ours.module)))
    return digests


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "transformer", "unused", "frozen", "used_twice", "odd_shapes"]
)
def test_accumulation_is_that_of_torch(name: str, engine: str) -> None:
    by_rank = run_ranks(_accumulate_beside_torch, 2, name, engine)
    assert by_rank[0] == by_rank[1]
    assert len(set(by_rank[0])) == 3


def _batch_norm_twice(rank: int, world_size: int, engine: str) -> None:
    """Re-sending buffers at the second forward must not spoil the first one's graph."""
    case = CASES["cnn"]
    ours = wrap_small(case.build(), engine)
    alone = copy.deepcopy(ours.module)
    for step in range(3):
        for model in (ours, alone):
            model.zero_grad()
            losses = [loss_of(model(*case.inputs(rank, 10 * step + k))) for k in range(2)]
            sum(losses).backward()
        want = {}
        for name, grad in gradients(alone).items():
            want[name] = grad * 0.5
            dist.all_reduce(want[name])
        assert_same_bits(gradients(ours.module), want, f"step {step}")


def test_two_forwards_of_batch_norm_before_one_backward(engine: str) -> None:
    run_ranks(_batch_norm_twice, 2, engine)


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, world_size: int, engine: str) -> None:
    run_ranks(SCENARIOS[name], world_size, engine)
