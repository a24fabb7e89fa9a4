"""`delay_all_reduce_named_params=`: averaged apart, when one parameter's gradient is there."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, digest, gradients, small_cap_mb
from tests.ranks import run_ranks


def _delay(model: nn.Module, names: Sequence[str], trigger: str) -> dict[str, Any]:
    params = dict(model.named_parameters())
    return {
        "delay_all_reduce_named_params": [(name, params[name]) for name in names],
        "param_to_hook_all_reduce": params[trigger],
    }


def _wrap(model: nn.Module, engine: str, names: Sequence[str], trigger: str) -> Any:
    return fastddp.DistributedDataParallel(
        model,
        engine=engine,
        bucket_cap_mb=small_cap_mb(model),
        **_delay(model, names, trigger),
    )


def _every_model(rank: int, world_size: int, engine: str, share: str) -> list[str]:
    """With every second parameter, or all, delayed: the same bits as without, step after step."""
    digests = []
    for name, case in CASES.items():
        if name == "many_tiny":
            continue  # only numbers
        model = case.build()
        params = [n for n, p in model.named_parameters() if p.requires_grad]
        delayed = params if share == "all" else params[::2]
        # Of those that get a gradient in every model, the one that is ready first.
        trigger = "last.weight" if name == "unused" else params[-1]
        ours = _wrap(model, engine, delayed, trigger)
        plain = fastddp.DistributedDataParallel(case.build(), engine=engine)
        assert ours.parameters_to_ignore == set(delayed)
        launched = {slot.param for bucket in ours.plan().buckets for slot in bucket.slots}
        assert len(launched) == len(params) - len(delayed)
        for step in range(3):
            for wrapped in (ours, plain):
                wrapped.zero_grad(set_to_none=step != 1)
                for micro in range(1 + step % 2):
                    with wrapped.no_sync() if micro else contextlib.nullcontext():
                        loss_of(wrapped(*case.inputs(rank, step + micro))).backward()
                loss_of(wrapped(*case.inputs(rank, 9))).backward()
            got = gradients(ours.module)
            assert_same_bits(got, gradients(plain.module), f"{name}, step {step}")
            digests.append(digest(got))
    return digests


@pytest.mark.parametrize("share", ["half", "all"])
def test_the_bits_are_those_without_a_delay(share: str, engine: str) -> None:
    by_rank = run_ranks(_every_model, 2, engine, share)
    assert by_rank[0] == by_rank[1]


def _beside_torch(rank: int, world_size: int, engine: str) -> None:
    """Torch's own, where what it does is right: everything delayed, the first parameter last."""
    models = [CASES["mlp"].build() for _ in range(2)]
    names = [n for n, _ in models[0].named_parameters()]
    for model in models:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(rank)  # rank 0's win
    ours = _wrap(models[0], engine, names[1:], names[0])
    theirs = TorchDDP(models[1], **_delay(models[1], names[1:], names[0]))
    assert_same_bits(models[0].state_dict(), models[1].state_dict(), "at the start")
    for step in range(3):
        for wrapped in (ours, theirs):
            wrapped.zero_grad()
            loss_of(wrapped(*CASES["mlp"].inputs(rank, step))).backward()
        dist.barrier()  # torch waits for nothing: this is after its all-reduce
        assert_same_bits(gradients(models[0]), gradients(models[1]), f"step {step}")


def test_the_bits_are_torchs(engine: str) -> None:
    run_ranks(_beside_torch, 2, engine)


def _when(rank: int, world_size: int, engine: str) -> None:
    """Only backwards that give the trigger a gradient average, and what others left is included."""
    model = Ladder()
    ours = _wrap(model, engine, "ab", "c")
    x, mean = ladder_x(rank, 0, world_size), mean_x(0, world_size)
    ours(x, used="dba").backward()
    assert model.a.grad[0] == x, "not yet averaged"
    assert model.d.grad[0] == 4 * mean, "averaged as ever"
    ours(x, used="ac").backward()
    assert model.a.grad[0] == 2 * mean
    assert model.b.grad[0, 0] == 2 * mean
    ours(x, used="ac").backward()
    assert model.a.grad[0] == 3 * mean, "averages may be averaged once more"
    ours.zero_grad()
    with ours.no_sync():
        ours(x, used="ac").backward()
    assert model.a.grad[0] == x
    assert model.c.grad == 3 * x
    ours(x, used="abc").backward()
    assert model.a.grad[0] == 2 * mean
    assert model.b.grad[0, 0] == 2 * mean

    # Different parameters on each rank, and one that no rank uses.
    ours.zero_grad()
    ours(x, used="ac" if rank == 0 else "c").backward()
    assert model.a.grad.tolist() == [ladder_x(0, 0, world_size) / world_size] * 3
    assert model.b.grad is None

    # These touch no other rank.
    if rank == 0:
        torch.autograd.grad(ours(x), [model.a, model.c])
        ours(x).backward(inputs=[model.a])
    dist.barrier()
    # A method of the model in place of forward.
    ours.zero_grad()
    model(x).backward()
    assert_ladder(model, mean, "without forward")
    # And there the trigger is the first to get a gradient on one rank only.
    ours.zero_grad()
    model(x, used="cba" if rank == 0 else "dcba").backward()
    assert model.a.grad[0] == mean
    assert model.b.grad[0, 0] == 2 * mean
    assert model.c.grad == 3 * mean
    assert model.d.grad[0] == 4 * ladder_x(1, 0, world_size) / world_size


def test_when_they_are_averaged(engine: str) -> None:
    run_ranks(_when, 2, engine)


class Shared(nn.Module):
    """One weight in several re-entrant checkpoints: several gradients in each backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(2))
        self.shared = nn.Parameter(torch.ones(2))

    def segment(self, x: Tensor) -> Tensor:
        return x * self.shared * self.first

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.first
        for _ in range(3):
            x = checkpoint(self.segment, x, use_reentrant=True)
        return x


def _checkpoints(rank: int, world_size: int, engine: str) -> None:
    """The trigger's gradient comes first from an inner backward, before others have theirs."""
    for delayed in (["shared"], ["first"], ["first", "shared"]):
        for trigger in ("shared", "first"):
            model = Shared()
            ours = _wrap(model, engine, delayed, trigger)
            for _ in range(3):
                ours.zero_grad()
                ours(torch.tensor([2.0, 4.0]) * (1 + rank)).sum().backward()
                assert model.shared.grad.tolist() == [9.0, 18.0], (delayed, trigger)
                assert model.first.grad.tolist() == [12.0, 24.0], (delayed, trigger)


def test_several_gradients_in_one_backward(engine: str) -> None:
    run_ranks(_checkpoints, 2, engine)


def _different_order(rank: int, world_size: int, engine: str) -> None:
    """Ranks whose ordinary buckets are launched at different times still agree on the order."""
    model = Ladder()
    ours = fastddp.DistributedDataParallel(
        model, engine=engine, bucket_cap_mb=1e-6, **_delay(model, "b", "c")
    )
    for step in range(6):
        ours.zero_grad()
        x, mean = ladder_x(rank, step, world_size), mean_x(step, world_size)
        ours(x, used="bc" if step % 2 == rank and step > 1 else "abcde").backward()
        assert model.b.grad[0, 0] == 2 * mean
        assert model.c.grad == 3 * mean
    assert ours.stats().rounds == 6


def test_ranks_that_use_different_parameters(engine: str) -> None:
    run_ranks(_different_order, 2, engine)


def _raise(_: Tensor) -> None:
    raise ValueError("on purpose")


def _failures(rank: int, world_size: int, engine: str) -> None:
    """A backward that raises on one rank, after the trigger, takes part all the same."""
    model = Ladder()
    ours = _wrap(model, engine, "ab", "e")

    def on_term(name: str, term: Tensor) -> None:
        if name == "b" and rank == 1 and step == 1:
            term.register_hook(_raise)

    for step in range(3):
        ours.zero_grad()
        output = ours(ladder_x(rank, step, world_size), on_term=on_term)
        if rank == 1 and step == 1:
            with pytest.raises(ValueError, match="on purpose"):
                output.backward()
        else:
            output.backward()
        if step != 1:
            assert_ladder(model, mean_x(step, world_size), f"step {step}")


def test_a_backward_that_raises(engine: str) -> None:
    run_ranks(_failures, 2, engine)


def _missing(rank: int, world_size: int, engine: str) -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = Ladder()
    ours = fastddp.DistributedDataParallel(
        model, process_group=group, engine=engine, **_delay(model, Ladder.NAMES, "e")
    )
    output = ours(1.0, used="abcde" if rank == 0 else "abcd")
    if rank == 0:
        says = r"rank 0: the all-reduce of 5 delayed gradients \('a' \.\.\.\).*'e'.*failed"
        with pytest.raises(dist.DistBackendError, match=says):
            output.backward()
    else:
        output.backward()
    dist.barrier()


def test_a_rank_that_does_not_reach_the_trigger_is_named(engine: str) -> None:
    run_ranks(_missing, 2, engine)


def _copies(rank: int, world_size: int, engine: str) -> None:
    model = Ladder()
    ours = _wrap(model, engine, "ab", "a")
    twin = copy.deepcopy(ours)
    clear = fastddp.wrap(Ladder(), engine=engine)
    assert clear.parameters_to_ignore == set()
    named = Ladder()
    clear = fastddp.wrap(named, engine=engine, **_delay(named, "bd", "b"))
    moved = _wrap(Ladder(), engine, "ab", "a").double()
    moved._update_process_group(dist.new_group([0, 1]))
    x = ladder_x(rank, 0, world_size)
    for wrapped in (ours, twin, clear, moved):
        wrapped(x).backward()
        assert_ladder(wrapped.module, mean_x(0, world_size), "a copy")
        assert wrapped.module.a.grad.dtype is wrapped.module.a.dtype


def test_copies_and_conversions(engine: str) -> None:
    run_ranks(_copies, 2, engine)


def _uneven(rank: int, world_size: int, engine: str) -> None:
    model = Ladder()
    ours = _wrap(model, engine, "ab", "a")
    with torch.distributed.algorithms.join.Join([ours]):
        for step in range(1 + rank):
            ours.zero_grad()
            ours(8.0).backward()
            average = 8.0 if step == 0 else 4.0
            assert_ladder(model, average, f"step {step}")


def test_uneven_inputs(engine: str) -> None:
    run_ranks(_uneven, 2, engine)


def _strides(rank: int, world_size: int, engine: str) -> None:
    """A conjugate or sparse gradient, one of other strides than its parameter."""
    model = nn.Module()
    model.table = nn.Embedding(4, 2, sparse=True)
    model.mix = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    ours = _wrap(model, engine, ["table.weight", "mix"], "mix")
    model.mix.grad = torch.full((3, 2), 2j * (1 + rank)).t().conj()
    (model.table(torch.tensor([rank])).sum() + (0 * model.mix).sum().real).backward()
    assert model.mix.grad.tolist() == [[-3j] * 3] * 2
    assert model.table.weight.grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]]
    assert ours.stats().rounds == 0


def test_odd_gradients(engine: str) -> None:
    run_ranks(_strides, 2, engine)


def _bad(rank: int, world_size: int) -> None:
    model = Ladder()
    frozen = nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    for given in (
        {"delay_all_reduce_named_params": [("a", model.a)]},
        {"param_to_hook_all_reduce": model.a},
    ):
        words = r"delay_all_reduce_named_params and param_to_hook_all_reduce need to be set at"
        for cls in (fastddp.DistributedDataParallel, TorchDDP):
            with pytest.raises(ValueError, match=words):
                cls(model, **given)
    for module, names, trigger, says in (
        (model, [("x", model.a)], model.a, r"'x' is not the name that Ladder has"),
        (model, [("a", model.b)], model.a, r"'a' is not the name .* shape \(2, 2\)"),
        (model, [("a", model.a)], frozen.bias, r"shape \(2,\) that is none of its parameters"),
        (frozen, [("bias", frozen.bias)], frozen.weight, r"shape \(2, 2\) that does not"),
    ):
        with pytest.raises(ValueError, match=says):
            fastddp.DistributedDataParallel(
                module, delay_all_reduce_named_params=names, param_to_hook_all_reduce=trigger
            )
    names = "ab" if rank else "ac"
    with pytest.raises(fastddp.MismatchError, match=r"the delay of all-reduces.*'b'.*'c'"):
        fastddp.DistributedDataParallel(model, **_delay(model, names, "a"))


def test_bad_arguments_are_refused() -> None:
    run_ranks(_bad, 2)
