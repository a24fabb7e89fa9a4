"""Which gradients are averaged when: accumulation, `no_sync`, unused parameters, broken backwards.

Nearly all scenarios use the `Ladder`, whose gradients are whole numbers that are known beforehand.
A scenario is a function `(rank, world_size, engine)` that checks itself on every rank;
`test_scenario`, at the end, runs each on two and three ranks with either engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import (
    assert_ladder,
    assert_same_bits,
    bits,
    digest,
    gradients,
    wrap_small,
)
from tests.ranks import run_ranks
from tests.slow import slow_but_for

SCENARIOS: dict[str, Callable[[int, int, str], object]] = {}


def scenario(fn: Callable[[int, int, str], object]) -> Callable[[int, int, str], object]:
    SCENARIOS[fn.__name__] = fn
    return fn


def _ladder(engine: str) -> fastddp.DistributedDataParallel:
    ours = wrap_small(Ladder(), engine)
    assert len(ours.plan().buckets) > 1
    return ours


# --- no_sync --------------------------------------------------------------------------------------


@scenario
def no_sync_accumulates_and_the_next_synced_backward_averages(
    rank: int, world_size: int, engine: str
) -> None:
    ours = _ladder(engine)
    for step in (0, 10, 20):
        ours.zero_grad()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size)).backward()
            assert_ladder(ours.module, ladder_x(rank, step, world_size), "only local")
            ours(ladder_x(rank, step + 1, world_size)).backward()
        local = ladder_x(rank, step, world_size) + ladder_x(rank, step + 1, world_size)
        assert_ladder(ours.module, local, "still local")
        ours(ladder_x(rank, step + 2, world_size)).backward()
        mean = sum(mean_x(step + k, world_size) for k in range(3))
        assert_ladder(ours.module, mean, step)


@scenario
def backward_decides_not_forward(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    x = ladder_x(rank, 1, world_size)

    loss = ours(x)
    with ours.no_sync():
        loss.backward()
    assert_ladder(ours.module, x, "forward outside, backward inside: local")

    ours.zero_grad()
    with ours.no_sync():
        loss = ours(x)
    loss.backward()
    assert_ladder(ours.module, mean_x(1, world_size), "forward inside, backward outside: averaged")


@scenario
def the_attribute_is_the_context(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    x = ladder_x(rank, 1, world_size)
    assert ours.require_backward_grad_sync is True
    ours.require_backward_grad_sync = False
    ours(x).backward()
    assert_ladder(ours.module, x, "local")
    with ours.no_sync():
        assert ours.require_backward_grad_sync is False
    assert ours.require_backward_grad_sync is False, "the context restores what it found"
    ours.require_backward_grad_sync = True
    ours(x).backward()
    assert_ladder(ours.module, 2 * mean_x(1, world_size), "averaged")
    with pytest.raises(KeyError), ours.no_sync():
        raise KeyError
    assert ours.require_backward_grad_sync is True


@scenario
def what_only_no_sync_used_is_averaged_too(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in (0, 1, 2):
        ours.zero_grad()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size), used="ad").backward()
        ours(ladder_x(rank, step + 5, world_size), used="abc").backward()
        early, late = mean_x(step, world_size), mean_x(step + 5, world_size)
        want = {"a": early + late, "b": late, "c": late, "d": early, "e": None}
        assert_ladder(ours.module, want, step)


@scenario
def what_only_no_sync_of_one_rank_used_is_averaged_too(
    rank: int, world_size: int, engine: str
) -> None:
    ours = _ladder(engine)
    for step in (0, 1, 2):
        ours.zero_grad()
        with ours.no_sync():
            used = "cd" if rank == 1 else "c"
            ours(ladder_x(rank, step, world_size), used=used).backward()
        ours(ladder_x(rank, step + 5, world_size), used="abc").backward()
        early, late = mean_x(step, world_size), mean_x(step + 5, world_size)
        only_1 = mean_x(step, world_size, only=[1])
        want = {"a": late, "b": late, "c": early + late, "d": only_1, "e": None}
        assert_ladder(ours.module, want, step)


@scenario
def what_was_accumulated_is_averaged_once(rank: int, world_size: int, engine: str) -> None:
    """In the round after the one that averaged it, an unused parameter is unused again."""
    ours = _ladder(engine)
    for step in range(2):
        ours.zero_grad()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size), used="d").backward()
        ours(ladder_x(rank, step, world_size), used="a").backward()
        ours.module.d.grad = torch.full((5,), 0.1 * (rank + 1))
        ours(ladder_x(rank, step, world_size), used="a").backward()
        assert bits(ours.module.d.grad) == bits(torch.full((5,), 0.1 * (rank + 1)))
        assert ours.module.a.grad.unique().tolist() == [2 * mean_x(step, world_size)]


@scenario
def zero_grad_between_no_sync_and_the_synced_backward(
    rank: int, world_size: int, engine: str
) -> None:
    """What was accumulated was thrown away, so it must not be averaged either."""
    ours = _ladder(engine)
    for step, set_to_none in ((0, True), (1, False), (2, True), (3, False)):
        ours(ladder_x(rank, 9, world_size)).backward()
        with ours.no_sync():
            ours(ladder_x(rank, step, world_size)).backward()
        ours.zero_grad(set_to_none=set_to_none)
        ours(ladder_x(rank, step, world_size), used="abc").backward()
        mean = mean_x(step, world_size)
        unused = None if set_to_none else 0.0
        assert_ladder(ours.module, dict.fromkeys("abc", mean) | dict.fromkeys("de", unused), step)
        ours.zero_grad()


# --- several forwards, several backwards ----------------------------------------------------------


@scenario
def several_forwards_before_one_backward(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        losses = [ours(ladder_x(rank, step + k, world_size), used="abcde"[k:]) for k in range(3)]
        torch.stack(losses).sum().backward()
        m = [mean_x(step + k, world_size) for k in range(3)]
        want = {"a": m[0], "b": m[0] + m[1], **dict.fromkeys("cde", sum(m))}
        assert_ladder(ours.module, want, step)
    assert ours.stats().rounds == 3, "one backward is one round, whatever the forwards"


@scenario
def several_backwards_before_zero_grad(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    total = 0.0
    for step in range(5):
        ours(ladder_x(rank, step, world_size)).backward()
        total += mean_x(step, world_size)
        assert_ladder(ours.module, total, step)


@scenario
def one_graph_backward_twice(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    loss = ours(ladder_x(rank, 2, world_size))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_ladder(ours.module, 2 * mean_x(2, world_size), "twice")


@scenario
def gradients_may_be_changed_in_place(rank: int, world_size: int, engine: str) -> None:
    """As clipping and unscaling do."""
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        for p in ours.parameters():
            p.grad.mul_(4)
        ours(ladder_x(rank, step + 1, world_size)).backward()
        assert_ladder(
            ours.module, 4 * mean_x(step, world_size) + mean_x(step + 1, world_size), step
        )


@scenario
def zero_grad_of_either_kind(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step, set_to_none in enumerate((False, True, False, False, True, True)):
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)
        ours.zero_grad(set_to_none=set_to_none)
        assert_ladder(ours.module, None if set_to_none else 0.0, step)


@scenario
def gradients_may_be_the_users_own_tensors(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(4):
        for name, p in ours.module.named_parameters():
            p.grad = torch.full_like(p, float(6 * Ladder.factor(name)) if step % 2 else 0.0)
        ours(ladder_x(rank, step, world_size)).backward()
        want = mean_x(step, world_size) + (6 if step % 2 else 0)
        assert_ladder(ours.module, want, step)


@scenario
def users_tensors_may_have_other_strides(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        ours.module.b.grad = torch.full((2, 2), 12.0).t()
        ours.module.d.grad = torch.full((5, 2), 24.0)[:, 0]
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        assert_ladder(ours.module, dict.fromkeys("ace", m) | dict.fromkeys("bd", m + 6), step)


@scenario
def autograd_grad_neither_synchronises_nor_disturbs(
    rank: int, world_size: int, engine: str
) -> None:
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        x = ladder_x(rank, step, world_size)
        grads = torch.autograd.grad(ours(x), list(ours.parameters()))
        assert [g.unique().tolist() for g in grads] == [[x * k] for k in range(1, 6)]
        assert_ladder(ours.module, None, "autograd.grad leaves .grad alone")
        ours(x).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)
    assert ours.stats().rounds == 3


@scenario
def backward_with_inputs(rank: int, world_size: int, engine: str) -> None:
    """`backward(inputs=...)` reaches some parameters only: the others are unused ones."""
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward(inputs=[ours.module.b, ours.module.e])
        m = mean_x(step, world_size)
        assert_ladder(ours.module, {"a": None, "b": m, "c": None, "d": None, "e": m}, step)


# --- unused parameters ----------------------------------------------------------------------------


@scenario
def used_by_no_rank_stays_without_a_gradient(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size), used="ace").backward()
        m = mean_x(step, world_size)
        assert_ladder(ours.module, {"a": m, "b": None, "c": m, "d": None, "e": m}, step)


@scenario
def used_by_no_rank_keeps_the_very_bits_of_an_older_gradient(
    rank: int, world_size: int, engine: str
) -> None:
    """A mean of equal values may be another value, and NaN is none: they must not move."""
    ours = _ladder(engine)
    odd = torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45])
    for step in range(4):
        ours.zero_grad()
        ours.module.d.grad = odd.clone()
        ours.module.a.grad = torch.tensor([0.1, 0.2, 0.3]) * (rank + 1)  # even if ranks differ
        kept = gradients(ours.module)
        ours(ladder_x(rank, step, world_size), used="bce").backward()
        for name in "ad":
            assert bits(ours.module.get_parameter(name).grad) == bits(kept[name]), (name, step)
        m = mean_x(step, world_size)
        for name in "bce":
            grad = ours.module.get_parameter(name).grad
            assert grad.unique().tolist() == [m * Ladder.factor(name)], "others' are not poisoned"


@scenario
def used_by_no_rank_keeps_the_bits_of_the_round_before(
    rank: int, world_size: int, engine: str
) -> None:
    """The older gradient is the bucket's own memory here."""
    ours = _ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(0.1 * (rank + 1) + step / 7).backward()
        kept = gradients(ours.module)
        assert bits(kept["d"]) is not None
        for again in range(3):
            ours(ladder_x(rank, step + again, world_size), used="ab").backward()
            now = gradients(ours.module)
            for name in "cde":
                assert bits(now[name]) == bits(kept[name]), (name, step, again)
            assert bits(now["a"]) != bits(kept["a"])


@scenario
def used_by_some_ranks_is_averaged_on_all(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size), used="abcde" if rank == 1 else "ae").backward()
        m, only_1 = mean_x(step, world_size), mean_x(step, world_size, only=[1])
        want = {"a": m, "b": only_1, "c": only_1, "d": only_1, "e": m}
        assert_ladder(ours.module, want, step)


@scenario
def used_by_some_ranks_adds_to_an_older_gradient(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(4):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        ours(ladder_x(rank, step + 1, world_size), used="abc" if rank == 0 else "cd").backward()
        first, second = mean_x(step, world_size), mean_x(step + 1, world_size)
        only_0 = mean_x(step + 1, world_size, only=[0])
        want = {
            "a": first + only_0,
            "b": first + only_0,
            "c": first + second,
            "d": first + second - only_0,
            "e": first,
        }
        assert_ladder(ours.module, want, step)


@scenario
def the_unused_set_changes_by_rank_and_step(rank: int, world_size: int, engine: str) -> None:
    def used_by(r: int, step: int) -> str:
        """Bits of a number that visits all sets; never empty: `a` is in when nothing else is."""
        chosen = [name for bit, name in enumerate("bcde") if (5 * step + 7 * r) >> bit & 1]
        return "".join(chosen) or "a"

    ours = _ladder(engine)
    for step in range(16):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size), used=used_by(rank, step)).backward()
        want: dict[str, float | None] = {}
        for name in Ladder.NAMES:
            users = [r for r in range(world_size) if name in used_by(r, step)]
            want[name] = mean_x(step, world_size, only=users) if users else None
        assert_ladder(ours.module, want, step)


@scenario
def a_rank_whose_backward_reaches_no_parameter(rank: int, world_size: int, engine: str) -> None:
    """It has no gradient to start a round with, and still the others wait for its part."""
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        x = torch.tensor(ladder_x(rank, step, world_size), requires_grad=True)
        if rank == 0:
            ours(x, used="").backward()
        else:
            ours(x).backward()
        others = mean_x(step, world_size, only=range(1, world_size))
        assert_ladder(ours.module, others, step)


@scenario
def frozen_parameters_stay_without_a_gradient(rank: int, world_size: int, engine: str) -> None:
    model = Ladder()
    model.b.requires_grad_(False)
    model.e.requires_grad_(False)
    ours = wrap_small(model, engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        assert_ladder(model, {"a": m, "b": None, "c": m, "d": m, "e": None}, step)


@scenario
def freezing_and_unfreezing_after_wrapping(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(6):
        ours.zero_grad()
        thawed = step % 2 == 0
        ours.module.c.requires_grad_(thawed)
        ours.module.e.requires_grad_(thawed)
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        wanted = m if thawed else None
        assert_ladder(ours.module, {"a": m, "b": m, "c": wanted, "d": m, "e": wanted}, step)


# --- backwards that end early ---------------------------------------------------------------------


class Stop(Exception):
    pass


def _raise_at(name_to_stop: str) -> Callable[[str, Tensor], object]:
    def raise_stop(_: Tensor) -> None:
        raise Stop

    def on_term(name: str, term: Tensor) -> None:
        if name == name_to_stop:
            term.register_hook(raise_stop)

    return on_term


@scenario
def an_exception_in_backward_on_all_ranks(rank: int, world_size: int, engine: str) -> None:
    """Before the first gradient, between two, and after some buckets are on their way."""
    ours = _ladder(engine)
    for step, name in enumerate("eacdbea"):
        ours.zero_grad()
        with pytest.raises(Stop):
            ours(ladder_x(rank, 9, world_size), on_term=_raise_at(name)).backward()
        for again in range(2):
            ours.zero_grad()
            ours(ladder_x(rank, step + again, world_size)).backward()
            assert_ladder(ours.module, mean_x(step + again, world_size), (name, again))


@scenario
def an_exception_in_backward_on_one_rank(rank: int, world_size: int, engine: str) -> None:
    """The others' backward ends, and the next step is right on all."""
    ours = _ladder(engine)
    for step, name in enumerate("dbca"):
        ours.zero_grad()
        if rank == 1:
            with pytest.raises(Stop):
                ours(ladder_x(rank, 9, world_size), on_term=_raise_at(name)).backward()
        else:
            ours(ladder_x(rank, 9, world_size)).backward()
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), name)


@scenario
def an_exception_under_no_sync(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step, name in enumerate("ca"):
        with pytest.raises(Stop), ours.no_sync():
            ours(ladder_x(rank, 9, world_size), on_term=_raise_at(name)).backward()
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), name)


@scenario
def a_forward_without_a_backward(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    for step in range(3):
        ours.zero_grad()
        with torch.no_grad():
            ours(1.0)
        ours(2.0)
        ours(ladder_x(rank, step, world_size)).backward()
        assert_ladder(ours.module, mean_x(step, world_size), step)


# --- hooks and checkpointing ----------------------------------------------------------------------


@scenario
def tensor_hooks_see_and_change_the_local_gradient(rank: int, world_size: int, engine: str) -> None:
    ours = _ladder(engine)
    seen = []

    def double(grad: Tensor) -> Tensor:
        seen.append(grad.unique().item())
        return 2 * grad

    ours.module.c.register_hook(double)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        m = mean_x(step, world_size)
        assert_ladder(ours.module, dict.fromkeys("abde", m) | {"c": 2 * m}, step)
    assert seen == [3 * ladder_x(rank, step, world_size) for step in range(3)]


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner.children():
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@scenario
def activation_checkpointing_changes_nothing(rank: int, world_size: int, engine: str) -> None:
    case = CASES["mlp"]
    for reentrant in (False, True):
        plain = wrap_small(case.build(), engine)
        ours = wrap_small(Checkpointed(case.build(), reentrant), engine)
        for step in range(3):
            (x,) = case.inputs(rank, step)
            x.requires_grad_()  # the re-entrant kind needs it
            for model in (plain, ours):
                model.zero_grad()
                loss_of(model(x)).backward()
            got = gradients(ours.module.inner)
            want = gradients(plain.module)
            for name, grad in want.items():
                # A re-entrant backward ends several times, and an average may be averaged again;
                # that of W equal numbers may round, though not between two ranks.
                rtol = 0.0 if world_size == 2 or not reentrant else 1e-6
                torch.testing.assert_close(got[name], grad, rtol=rtol, atol=0.0)


class SkipsLayers(nn.Module):
    """All of it is checkpointed, so every gradient comes from a backward within the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        for index, layer in enumerate(self.layers):
            if not (skip and index == 1):
                x = torch.tanh(checkpoint(layer, x, use_reentrant=True))
        return x


@scenario
def reentrant_checkpoints_whose_number_differs_by_rank(
    rank: int, world_size: int, engine: str
) -> None:
    ours = wrap_small(SkipsLayers(), engine)
    plain = SkipsLayers()

    def loss(model: nn.Module, r: int, step: int) -> Tensor:
        x = torch.full((1, 3), float(r + 1), requires_grad=True)
        return loss_of(model(x, r == 0 and step == 1))

    for step in range(3):
        ours.zero_grad()
        loss(ours, rank, step).backward()
        plain.zero_grad()
        for r in range(world_size):
            (loss(plain, r, step) / world_size).backward()
        for name, p in plain.named_parameters():
            # The same three sums and scalings in another order: a few roundings.
            torch.testing.assert_close(
                ours.module.get_parameter(name).grad, p.grad, rtol=1e-5, atol=1e-7
            )


class PartlyCheckpointed(nn.Module):
    """The shared layer's gradient arrives twice in one backward: from within and from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CASES["used_twice"].build()

    def forward(self, x: Tensor) -> Tensor:
        first, shared, last = self.inner.children()
        x = checkpoint(lambda x: torch.tanh(shared(torch.tanh(first(x)))), x, use_reentrant=True)
        return last(torch.tanh(shared(x)))


@scenario
def two_gradients_of_a_parameter_in_one_backward(rank: int, world_size: int, engine: str) -> None:
    """They add up, also where each parameter has a bucket of its own that could go after one."""
    case = CASES["used_twice"]
    plain = fastddp.DistributedDataParallel(case.build(), engine=engine)
    for cap_mb in (None, 1e-6):
        ours = fastddp.DistributedDataParallel(
            PartlyCheckpointed(), engine=engine, bucket_cap_mb=cap_mb
        )
        for step in range(4):
            (x,) = case.inputs(rank, step)
            x.requires_grad_()
            for model in (ours, plain):
                model.zero_grad()
                loss_of(model(x)).backward()
            for name, want in gradients(plain.module).items():
                # Scaled before they are added instead of after: a rounding more per term.
                got = ours.module.inner.get_parameter(name).grad
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@scenario
def a_second_gradient_that_there_never_was_before(rank: int, world_size: int, engine: str) -> None:
    """If the first is still here they add up; once it is gone the error says what to do."""
    ours = fastddp.DistributedDataParallel(PartlyCheckpointed(), engine=engine, bucket_cap_mb=1e-6)
    (x,) = CASES["used_twice"].inputs(rank, 0)
    with mock.patch(f"{__name__}.checkpoint", lambda segment, x, **_: segment(x)):
        for _ in range(2):
            loss_of(ours(x)).backward()
    with pytest.raises(
        RuntimeError, match=r"inner\.shared\.\w+' got gradient number 2 .*use_reentrant=False"
    ):
        loss_of(ours(x.requires_grad_())).backward()


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, world_size: int, engine: str) -> None:
    run_ranks(SCENARIOS[name], world_size, engine)


# --- beside torch's class -------------------------------------------------------------------------


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
