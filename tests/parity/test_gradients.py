"""Gradients are torch's, are one process's on the whole batch, and are the same bits everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.utils._python_dispatch import TorchDispatchMode

import fastddp
from tests.conftest import flattening, require_native
from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import (
    assert_ladder,
    assert_same_bits,
    assert_within,
    digest,
    gradients,
    rounding_of_average,
    small_cap_mb,
    wide,
    wrap_small,
)
from tests.ranks import run_ranks
from tests.slow import slow_but_for

STEPS = 4  # the second step brings the learned order and new buckets, the third reuses them


# --- torch's class --------------------------------------------------------------------------------


def _train_beside_torch(
    rank: int, world_size: int, name: str, engine: str, small_buckets: bool
) -> list[str]:
    """Compare every step; with two ranks to the bit, for x/2 + y/2 can be summed in one way."""
    case = CASES[name]
    exact = world_size <= 2
    cap_mb = small_cap_mb(case.build()) if small_buckets else None
    ours = fastddp.DistributedDataParallel(case.build(), engine=engine, bucket_cap_mb=cap_mb)
    theirs = TorchDDP(case.build(), find_unused_parameters=case.has_unused)
    alone = case.build()
    our_optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    digests = []
    for step in range(STEPS):
        what = f"{name}, step {step}"
        inputs = case.inputs(rank, step)
        if not exact:  # compare gradients of the same parameters: differences must not add up
            alone.load_state_dict(theirs.module.state_dict())
            ours.module.load_state_dict(theirs.module.state_dict())
            alone.zero_grad()
            loss_of(alone(*inputs)).backward()
        our_optimizer.zero_grad()
        their_optimizer.zero_grad()
        our_loss, their_loss = loss_of(ours(*inputs)), loss_of(theirs(*inputs))
        assert torch.equal(our_loss, their_loss), what
        our_loss.backward()
        their_loss.backward()
        got, want = gradients(ours.module), gradients(theirs.module)
        if exact:
            assert_same_bits(got, want, what)
        else:
            assert_within(got, want, rounding_of_average(gradients(alone)), what)
        assert any(g is not None and g.abs().sum() > 0 for g in got.values()), "nothing was tested"
        assert_same_bits(dict(ours.named_buffers()), dict(theirs.named_buffers()), what)
        digests.append(digest(got))
        our_optimizer.step()
        their_optimizer.step()
        if exact:
            assert_same_bits(ours.state_dict(), theirs.state_dict(), what)
    if world_size == 1:
        assert ours.plan().buckets == (), "nothing to reduce"
    elif small_buckets:
        assert len(ours.plan().buckets) > 1, "the cap was meant to make several buckets"
    return digests


@pytest.mark.parametrize("world_size", slow_but_for([1, 2], [1, 2, 3, 4]))
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_torch(name: str, world_size: int, engine: str) -> None:
    by_rank = run_ranks(_train_beside_torch, world_size, name, engine, True)
    assert len(by_rank[0]) == STEPS
    for digests in by_rank:
        assert digests == by_rank[0], "ranks hold different bits"


@pytest.mark.parametrize("world_size", slow_but_for([3], [2, 3]))
@pytest.mark.parametrize("name", ["mlp", "mixed_dtypes", "unused"])
def test_gradients_are_those_of_torch_with_default_buckets(
    name: str, world_size: int, engine: str
) -> None:
    by_rank = run_ranks(_train_beside_torch, world_size, name, engine, False)
    assert by_rank == [by_rank[0]] * world_size


# --- one process ----------------------------------------------------------------------------------


def _train_beside_one_process(rank: int, world_size: int, name: str, engine: str) -> None:
    """In float64, so that what rounding does (1e-16) is far from what a wrong average does (1)."""
    case = CASES[name]
    dtype = torch.complex128 if name == "complex" else torch.float64
    model, reference = case.build(), case.build()
    for m in (model, reference):
        for p in m.parameters():
            p.data = p.data.to(dtype if p.is_complex() else torch.float64)
        for b in m.buffers():
            b.data = b.data.to(torch.float64) if b.is_floating_point() else b.data
        if case.has_batch_norm:
            m.eval()  # with the running statistics a sample's output is its own
    ours = wrap_small(model, engine)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, reference)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(ours(*case.inputs(rank, step, torch.float64))).backward()
        loss_of(reference(*case.whole_batch(world_size, step, torch.float64))).backward()
        got, want = gradients(model), gradients(reference)
        # A gradient is a sum of fewer than 1e4 products along a path of fewer than 10 layers, so
        # its rounding is below 1e5 * eps of the sum of their sizes. That sum is at most 1e3 times
        # the largest element (these models do not cancel more); errors of three steps add up.
        tolerance = {
            n: torch.full_like(wide(g), 3 * 1e5 * 2.3e-16 * 1e3)
            * wide(g).abs().max().clamp(min=1e-3)
            for n, g in want.items()
            if g is not None and g.numel()
        }
        tolerance.update({n: wide(g) for n, g in want.items() if g is not None and not g.numel()})
        assert_within(got, want, tolerance, f"{name}, step {step}")
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("world_size", slow_but_for([3], [2, 3]))
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process_on_the_whole_batch(
    name: str, world_size: int, engine: str
) -> None:
    run_ranks(_train_beside_one_process, world_size, name, engine)


# --- exact averages -------------------------------------------------------------------------------


def _exact_averages(rank: int, world_size: int, engine: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ours = wrap_small(Ladder(dtype), engine)
        for step in range(STEPS):
            ours.zero_grad()
            ours(ladder_x(rank, step, world_size)).backward()
            mean = mean_x(step, world_size)
            assert mean * 5 < 256, "bfloat16 holds all whole numbers up to here"
            assert_ladder(ours.module, mean, (dtype, step))
            assert {p.grad.dtype for p in ours.parameters()} == {dtype}
        if world_size > 1:
            assert ours.stats().rounds == STEPS
            assert ours.stats().num_buckets == len(ours.plan().buckets) > 1


@pytest.mark.parametrize("world_size", slow_but_for([1, 2, 3], [1, 2, 3, 4]))
def test_whole_numbers_average_exactly_in_every_dtype(world_size: int, engine: str) -> None:
    run_ranks(_exact_averages, world_size, engine)


# --- the two engines ------------------------------------------------------------------------------


def _train(rank: int, world_size: int, name: str, engine: str) -> list[str]:
    case = CASES[name]
    ours = wrap_small(case.build(), engine)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    digests = []
    for step in range(STEPS):
        with ours.no_sync():
            loss_of(ours(*case.inputs(rank, 100 + step))).backward()
        loss_of(ours(*case.inputs(rank, step))).backward()
        digests.append(digest(gradients(ours.module)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return digests


def _train_with_each_engine(rank: int, world_size: int, name: str) -> dict[str, list[str]]:
    mixed = ("native", "python")[rank % 2]
    return {
        label: _train(rank, world_size, name, engine)
        for label, engine in (("native", "native"), ("python", "python"), ("mixed", mixed))
    }


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize("name", CASES)
def test_engines_give_the_same_bits_also_when_ranks_mix_them(name: str, world_size: int) -> None:
    require_native()
    by_rank = run_ranks(_train_with_each_engine, world_size, name)
    want = by_rank[0]["python"]
    assert len(set(want)) == STEPS, "every step has other gradients"
    for rank in range(world_size):
        for label in ("native", "python", "mixed"):
            assert by_rank[rank][label] == want, (rank, label)


def _plans(rank: int, world_size: int, name: str) -> list[object]:
    case = CASES[name]
    plans: list[object] = []
    for engine in ("native", "python"):
        ours = wrap_small(case.build(), engine)
        for step in range(2):
            loss_of(ours(*case.inputs(rank, step))).backward()
            plans.append(ours.plan())
    return plans


@pytest.mark.parametrize("name", ["mlp", "mixed_dtypes", "many_tiny", "unused", "complex"])
def test_engines_and_ranks_make_the_same_plans(name: str) -> None:
    require_native()
    by_rank = run_ranks(_plans, 2, name)
    assert by_rank[0] == by_rank[1]
    native, python = by_rank[0][:2], by_rank[0][2:]
    assert native == python


# --- layout ---------------------------------------------------------------------------------------


def _layout(rank: int, world_size: int, name: str, engine: str) -> None:
    case = CASES[name]
    ours = wrap_small(case.build(), engine)
    params = [p for p in ours.module.parameters() if p.requires_grad]
    addresses = []
    for step in range(STEPS):
        ours.zero_grad()
        loss_of(ours(*case.inputs(rank, step))).backward()
        buckets = ours.plan().buckets
        assert sorted(s.param for b in buckets for s in b.slots) == list(range(len(params)))
        for bucket in buckets:
            starts = set()
            for slot in bucket.slots:
                p = params[slot.param]
                if p.grad is None:
                    continue
                assert p.grad.dtype == p.dtype
                assert p.grad.shape == p.shape
                assert p.grad.stride() == p.stride(), (name, step)
                assert p.grad.untyped_storage().nbytes() >= bucket.numel * bucket.dtype.itemsize
                if p.numel():
                    start = p.grad.data_ptr() - slot.offset * bucket.dtype.itemsize
                    assert start == p.grad.untyped_storage().data_ptr()
                    starts.add(start)
            assert len(starts) <= 1, "the slots of a bucket lie in one memory"
        addresses.append([p.grad.data_ptr() for p in params if p.grad is not None])
    assert addresses[-1] == addresses[-2], "once the order is known the memory stays"
    for p in params:
        if p.grad is not None:
            p.grad.detach_()  # what zero_grad(set_to_none=False) and many scripts do
            p.grad.zero_()


@pytest.mark.parametrize("name", CASES)
def test_gradients_lie_in_the_buckets_and_have_the_strides_of_their_parameters(
    name: str, engine: str
) -> None:
    run_ranks(_layout, 2, name, engine)


def test_the_channels_last_case_is_one() -> None:
    """Else the test of strides above would show nothing."""
    weights = [p for p in CASES["channels_last"].build().parameters() if p.dim() == 4]
    assert len(weights) == 2
    assert not any(p.is_contiguous() for p in weights)
    assert not CASES["odd_shapes"].build().transposed.is_contiguous()


# --- two wrapped models, sub-groups ---------------------------------------------------------------


def _two_models(rank: int, world_size: int, engine: str) -> None:
    """Their backwards may interleave in any way that is the same on every rank."""
    first, second = (wrap_small(Ladder(), engine) for _ in range(2))
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        x = ladder_x(rank, step, world_size)
        (first(x) + second(2 * x)).backward()  # one backward over both
        second(x).backward()
        assert_ladder(first.module, mean_x(step, world_size), ("first", step))
        assert_ladder(second.module, 3 * mean_x(step, world_size), ("second", step))


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_wrapped_models_keep_apart(world_size: int, engine: str) -> None:
    run_ranks(_two_models, world_size, engine)


def _sub_group(rank: int, world_size: int, engine: str) -> None:
    evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
    mine = evens if rank % 2 == 0 else odds
    members = [rank % 2, rank % 2 + 2]
    ours = fastddp.DistributedDataParallel(Ladder(), process_group=mine, engine=engine)
    for step in range(3):
        ours.zero_grad()
        ours(ladder_x(rank, step, world_size)).backward()
        mean = sum(ladder_x(r, step, world_size) for r in members) / 2
        assert_ladder(ours.module, mean, step)


def test_the_average_is_over_the_group_that_was_given(engine: str) -> None:
    run_ranks(_sub_group, 4, engine)


def _threads(rank: int, world_size: int, engine: str) -> list[str]:
    """Large enough that torch may use several threads for a copy."""
    torch.set_num_threads(2)
    torch.manual_seed(3)
    plain = nn.Linear(300, 301)
    ours = fastddp.DistributedDataParallel(copy.deepcopy(plain), engine=engine)
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(rank))
    digests = []
    for _ in range(3):
        ours.zero_grad()
        plain.zero_grad()
        loss_of(ours(x)).backward()
        loss_of(plain(x)).backward()
        want = {}
        for name, grad in gradients(plain).items():
            assert grad is not None
            half = grad * 0.5
            dist.all_reduce(half)
            want[name] = half
        assert_same_bits(gradients(ours.module), want, "large")
        digests.append(digest(gradients(ours.module)))
    return digests


def test_large_gradients_with_several_torch_threads(engine: str) -> None:
    by_rank = run_ranks(_threads, 2, engine)
    assert by_rank[0] == by_rank[1]


# --- the fused pass -------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _count_copies(rank: int, world_size: int) -> int:
    with flattening():
        narrow = nn.Linear(8, 1, bias=False)
        model = fastddp.DistributedDataParallel(narrow, engine="native")
        for _ in range(3):
            model.zero_grad()
            # A gradient whose strides are another's where the size is 1, and nowhere else.
            loss = torch.einsum("bi,oi->bo", torch.ones(4, 8), narrow.weight).sum()
            operators = _Operators()
            with operators:
                loss.backward()
    return sum("mul.out" in name for name in operators.names)


def test_strides_of_dimensions_of_size_1_leave_nothing_out_of_the_fused_pass() -> None:
    require_native()
    assert run_ranks(_count_copies, 2) == [0, 0]
