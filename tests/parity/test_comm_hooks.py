"""Communication hooks: torch's own, unchanged, do with our buckets what they do with torch's."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, digest, gradients, small_cap_mb
from tests.ranks import run_ranks

STEPS = 4

Hook = Callable[[Any, Any], Any]


def _build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 2))


def _inputs(rank: int, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def power_sgd(matrix_approximation_rank: int) -> powerSGD_hook.PowerSGDState:
    return powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=matrix_approximation_rank,
        start_powerSGD_iter=2,
        min_compression_rate=0.5,
    )


def local_sgd() -> post_localSGD_hook.PostLocalSGDState:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return post_localSGD_hook.PostLocalSGDState(
        process_group=None,
        subgroup=alone[dist.get_rank()],
        start_localSGD_iter=2,
        post_local_gradient_allreduce=True,
    )


def two_steps(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    """Scale, sum, sum once more, divide: a chain of two collectives."""
    world_size = dist.get_world_size()
    first = dist.all_reduce(bucket.buffer() / world_size, async_op=True).get_future()

    def again(future: Future[list[Tensor]]) -> Tensor:
        total = future.value()[0]
        return dist.all_reduce(total, async_op=True).get_future().wait()[0] / world_size

    return first.then(again)


def by_parameter(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    """Look at the bucket in all the ways that there are."""
    owners, grads = bucket.parameters(), bucket.gradients()
    assert [g.shape for g in grads] == [p.shape for p in owners]
    assert sum(p.numel() for p in owners) == bucket.buffer().numel(), "a gap in the buffer"
    state.append((bucket.index(), bucket.is_last()))  # type: ignore[attr-defined]
    for grad in grads:  # they are views: what is done to them is done to the buffer
        grad.mul_(2)
    packed = bucket.buffer().clone()
    bucket.set_buffer(packed)
    assert bucket.gradients()[0].data_ptr() == packed.data_ptr()
    dist.all_reduce(packed)
    future: Future[Tensor] = Future()
    future.set_result(packed / (2 * dist.get_world_size()))
    return future


# Not here: torch's quantization hooks, which fail on gloo with torch's class too.
HOOKS: dict[str, tuple[Hook, Callable[[], Any]]] = {
    "allreduce": (default_hooks.allreduce_hook, lambda: None),
    "fp16": (default_hooks.fp16_compress_hook, lambda: None),
    "fp16 of allreduce": (
        default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook),
        lambda: None,
    ),
    "power_sgd": (powerSGD_hook.powerSGD_hook, lambda: power_sgd(1)),
    "fp16 of power_sgd": (
        default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook),
        lambda: power_sgd(1),
    ),
    "post local SGD": (post_localSGD_hook.post_localSGD_hook, local_sgd),
    "noop": (debugging_hooks.noop_hook, lambda: None),
    "two steps": (two_steps, lambda: None),
    "by parameter": (by_parameter, list),
}


def _beside_torch(rank: int, world_size: int, name: str, engine: str) -> list[str]:
    hook, make_state = HOOKS[name]
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)  # PowerSGD tells its settings
    ours = fastddp.DistributedDataParallel(_build(), engine=engine)
    theirs = TorchDDP(_build())
    ours.register_comm_hook(make_state(), hook)
    theirs.register_comm_hook(make_state(), hook)
    digests = []
    for step in range(STEPS):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model(_inputs(rank, step))).backward()
        got = gradients(ours.module)
        assert_same_bits(got, gradients(theirs.module), f"{name}, step {step}")
        assert any(g is not None and g.abs().sum() > 0 for g in got.values())
        digests.append(digest(got))
        for param in (*ours.parameters(), *theirs.parameters()):
            param.data -= 0.1 * param.grad
    # A callback of torch's hook holds the group, and the transport's thread that ran it may drop it
    # last, a moment later: it would then wait for itself.
    dist.barrier()
    return digests


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_torchs_gives_torchs_bits(name: str, engine: str) -> None:
    by_rank = run_ranks(_beside_torch, 2, name, engine)
    if name not in ("noop", "post local SGD"):
        assert by_rank[0] == by_rank[1]


def _all_models(rank: int, world_size: int, engine: str) -> None:
    """With the hook that does what is done without one, for every kind of parameter there is."""
    for name, case in CASES.items():
        if name == "many_tiny":
            continue  # only numbers
        cap_mb = small_cap_mb(case.build())
        hooked, plain = (
            fastddp.DistributedDataParallel(case.build(), engine=engine, bucket_cap_mb=cap_mb)
            for _ in range(2)
        )
        hooked.register_comm_hook(None, default_hooks.allreduce_hook)
        for step in range(3):
            for model in (hooked, plain):
                model.zero_grad()
                loss_of(model(*case.inputs(rank, step))).backward()
            assert_same_bits(gradients(hooked), gradients(plain), f"{name}, step {step}")


def test_every_kind_of_parameter_goes_through_a_hook(engine: str) -> None:
    run_ranks(_all_models, 2, engine)


def _builtin(rank: int, world_size: int, engine: str) -> None:
    for kind in (dist.BuiltinCommHookType.ALLREDUCE, dist.BuiltinCommHookType.FP16_COMPRESS):
        ours = fastddp.DistributedDataParallel(_build(), engine=engine)
        theirs = TorchDDP(_build())
        for model in (ours, theirs):
            model._register_builtin_comm_hook(kind)
        for step in range(STEPS):
            for model in (ours, theirs):
                model.zero_grad()
                loss_of(model(_inputs(rank, step))).backward()
            assert_same_bits(gradients(ours), gradients(theirs), f"{kind}, step {step}")
    with pytest.raises(ValueError, match="is not one of"):
        fastddp.wrap(_build(), engine=engine)._register_builtin_comm_hook("fp8")


def test_builtin_hooks_give_torchs_bits(engine: str) -> None:
    run_ranks(_builtin, 2, engine)


def _order(rank: int, world_size: int, engine: str) -> list[tuple[int, bool]]:
    model = _build()
    wrapped = fastddp.wrap(model, engine=engine, bucket_cap_mb=small_cap_mb(model))
    seen: list[tuple[int, bool]] = []
    wrapped.register_comm_hook(seen, by_parameter)
    wrapped(_inputs(rank, 0)).sum().backward()
    assert wrapped.plan().buckets
    return seen


def test_buckets_come_in_order_and_the_last_says_so(engine: str) -> None:
    first, second = run_ranks(_order, 2, engine)
    assert first == second
    assert len(first) > 1
    assert first == [(n, n == len(first) - 1) for n in range(len(first))]


# --- no graph flags with hooks either -------------------------------------------------------------


def _different_parts(rank: int, world_size: int, engine: str) -> None:
    ladder = Ladder()
    model = fastddp.wrap(ladder, engine=engine, bucket_cap_mb=small_cap_mb(ladder))
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    for step in range(4):
        model.zero_grad()
        used = [("a", "b"), ("b", "c"), ("c",), ("a", "c")][(step + rank) % 4]
        other = [("a", "b"), ("b", "c"), ("c",), ("a", "c")][(step + 1 - rank) % 4]
        model(ladder_x(rank, step, world_size), used).backward()
        want: dict[str, float | None] = dict.fromkeys(Ladder.NAMES)
        for name in Ladder.NAMES:
            ranks = [r for r, names in ((rank, used), (1 - rank, other)) if name in names]
            if ranks:
                want[name] = mean_x(step, world_size, only=ranks)
        assert_ladder(model, want, step)


def _accumulating(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(_build(), engine=engine)
    plain = fastddp.wrap(_build(), engine=engine)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    for net in (model, plain):
        with net.no_sync():
            net(_inputs(rank, 0)).sum().backward()
        net(_inputs(rank, 1)).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_sync_with_a_hook(engine: str) -> None:
    run_ranks(_accumulating, 2, engine)


# --- what can go wrong ----------------------------------------------------------------------------


def raises_at_once(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    raise KeyError("hook in trouble")


def raises_later(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    def fail(_: object) -> Tensor:
        raise ValueError("callback in trouble")

    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(fail)


def returns_a_tensor(state, bucket):
    return bucket.buffer()


def returns_nothing(state, bucket):
    return None


def wrong_size(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer()[:-1])
    return future


def _in_trouble(rank: int, world_size: int, engine: str) -> None:
    for hook, error, text in (
        (raises_at_once, KeyError, "hook in trouble"),
        (raises_later, RuntimeError, "callback in trouble"),
        (
            returns_a_tensor,
            RuntimeError,
            "must return a torch.futures.Future object.*Tensor",
        ),
        (returns_nothing, RuntimeError, "must return a torch.futures.Future object.*None"),
        (wrong_size, RuntimeError, "as many elements as bucket.buffer"),
    ):
        model = fastddp.wrap(_build(), engine=engine)
        model.register_comm_hook(None, hook)
        with pytest.raises(error, match=text):
            model(_inputs(rank, 0)).sum().backward()
    # The process, and its group, go on.
    model = fastddp.wrap(_build(), engine=engine)
    model(_inputs(rank, 0)).sum().backward()


def test_what_goes_wrong_in_a_hook_comes_out_of_backward(engine: str) -> None:
    run_ranks(_in_trouble, 2, engine)


def wrong_bucket(state: object, bucket: int) -> Future[Tensor]: ...


def wrong_return(state: object, bucket: dist.GradBucket) -> Tensor: ...


def _registering(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(_build(), engine=engine)
    with pytest.raises(TypeError, match="Communication hook must be callable"):
        model.register_comm_hook(None, 1)
    for hook, what in ((wrong_bucket, "bucket annotation"), (wrong_return, "return annotation")):
        real = copy.copy(hook)
        real.__annotations__ = (
            {"bucket": int, "return": Tensor}
            if what.startswith("b")
            else {
                "bucket": dist.GradBucket,
                "return": Tensor,
            }
        )
        with pytest.raises(ValueError, match=what):
            model.register_comm_hook(None, real)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(RuntimeError, match="can only be called once"):
        model.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(RuntimeError, match="can only be called once"):
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)


def test_bad_hooks_are_refused_in_torchs_words(engine: str) -> None:
    run_ranks(_registering, 1, engine)


def test_a_hook_without_a_group_is_refused() -> None:
    model = fastddp.wrap(_build())
    with pytest.raises(RuntimeError, match="needs a process group"):
        model.register_comm_hook(None, default_hooks.allreduce_hook)


def _asks(rank: int, world_size: int, engine: str) -> None:
    """A hook may ask the wrapper for figures in the midst of a round."""
    model = fastddp.wrap(_build(), engine=engine)
    seen = []

    def hook(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
        seen.append((model.stats().rounds, len(model.plan().buckets)))
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    for step in range(2):
        model(_inputs(rank, step)).sum().backward()
    assert seen == [(0, 1), (1, 1)]


def test_a_hook_may_ask_for_stats(engine: str) -> None:
    run_ranks(_asks, 2, engine)


def _alone(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(_build(), engine=engine)
    calls: list[tuple[int, bool]] = []
    model.register_comm_hook(calls, by_parameter)
    model(_inputs(rank, 0)).sum().backward()
    alone = _build()
    alone(_inputs(rank, 0)).sum().backward()
    assert calls
    assert_same_bits(gradients(model), gradients(alone), "a world of one")


def test_a_world_of_one_runs_its_hook(engine: str) -> None:
    run_ranks(_alone, 1, engine)


def _drop(rank: int, world_size: int, engine: str) -> None:
    ours = fastddp.DistributedDataParallel(nn.Linear(2, 2), engine=engine)
    ours.register_comm_hook(None, default_hooks.allreduce_hook)
    for _ in range(2):
        ours(torch.ones(1, 2)).sum().backward()
    reducer = ours._replica.attachment.reducer
    runner = weakref.ref(reducer._hook if engine == "native" else reducer._launcher.hook)
    del reducer
    gc.disable()
    try:
        ours._replica.attachment = None
        assert runner() is None, "a cycle keeps its buffers"
    finally:
        gc.enable()


def test_a_dropped_reducer_lets_go_of_its_hook(engine: str) -> None:
    run_ranks(_drop, 2, engine)
