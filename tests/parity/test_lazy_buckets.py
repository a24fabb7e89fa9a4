"""`lazy_bucket_allocation=True`: buckets are there from their first gradient to the last `.grad`.

Memory is counted, not timed: the storages that are alive, and the blocks of the shared heap in use.
The oracle is the same model wrapped without: it has to have the same bits, step after step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel.distributed import _MixedPrecision as MixedPrecision

import fastddp
from fastddp import extension
from tests.conftest import flattening
from tests.parity.checks import assert_same_bits, gradients
from tests.ranks import run_ranks
from tests.slow import slow_but_for

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}
WIDTH = 16
STEPS = 14  # beyond the rounds in which shared memory tries when to launch


class Layers(nn.Module):
    """Layers that a step may skip, and a sparse gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, WIDTH, sparse=True)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, used: str = "0123") -> Tensor:
        x = x + self.words(torch.arange(3))
        for nth in map(int, used):
            x = x + torch.tanh(self.layers[nth](x))
        return x


def _wrap(engine: str, *, lazy: bool, **options: Any) -> fastddp.DistributedDataParallel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Layers()
    options |= {"lazy_bucket_allocation": True} if lazy else {}
    wrapped = fastddp.DistributedDataParallel(model, engine=engine, bucket_cap_mb=1e-3, **options)
    assert wrapped.lazy_bucket_allocation == lazy
    return wrapped


def _x(rank: int, step: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def _used(rank: int, step: int) -> str:
    """Another set on each rank; in some steps none has the last layer."""
    return ("0123", "01", "023", "12")[(step + rank) % 4 if step % 3 else 1 + step % 2]


# ---- memory --------------------------------------------------------------------------------------


def _buckets(model: nn.Module) -> set[StorageWeakRef]:
    dense = [p.grad for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    return {StorageWeakRef(grad.untyped_storage()) for grad in dense}


def _soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds once the transport's threads have let go, which is a moment later."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds()


def _heap() -> int:
    return extension.load().shm_heap_used()


def _counted(rank: int, world_size: int, engine: str, way: str, transport: str) -> None:
    options: dict[str, Any] = {
        "comm_dtype": {"comm_dtype": torch.bfloat16},
        "mixed precision": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
    }.get(way, {})
    on_heap = transport == "shm" and way != "mixed precision"
    ours = _wrap(engine, lazy=True, **options)
    if way == "hook":
        ours.register_comm_hook(None, default_hooks.allreduce_hook)
    in_use: set[int] = set()
    for step in range(4):
        at_forward = _heap() if on_heap else 0
        output = ours(_x(rank, step))
        if on_heap:
            assert _heap() == at_forward, "nothing is allocated before a gradient"
            seen: list[int] = []
            handle = ours.module.layers[2].weight.register_hook(
                lambda _, seen=seen: seen.append(_heap())
            )
        output.square().mean().backward()
        buckets = _buckets(ours)
        if step:  # the first plan has them in another order
            assert len(buckets) == ours.stats().num_buckets > 2, (len(buckets), ours.plan())
        assert not any(bucket.expired() for bucket in buckets)
        if on_heap and way == "plain":
            in_backward, after = seen[0] - at_forward, _heap() - at_forward
            assert 0 < in_backward < after, "those of the layers behind it"
            handle.remove()
        kept = ours.module.layers[0].bias.grad
        ours.zero_grad()
        assert _soon(lambda b=buckets: sum(not bucket.expired() for bucket in b) == 1)
        del kept
        assert _soon(lambda b=buckets: all(bucket.expired() for bucket in b)), "none is kept"
        assert ours.reducer._get_local_used_map().tolist() == [world_size] * 9
        if on_heap and step:
            in_use.add(_heap())
            assert len(in_use) == 1, "the same after each step"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", ["plain", "hook", "comm_dtype", "mixed precision"])
def test_no_bucket_lives_in_forward(engine: str, transport: str, way: str) -> None:
    if transport == "shm" and extension.load() is None:
        pytest.skip("shared memory is of the extension")
    run_ranks(_counted, 2, engine, way, transport, env=TRANSPORTS[transport])


# ---- values --------------------------------------------------------------------------------------


def _same_bits(rank: int, world_size: int, engine: str, way: str) -> None:
    options: dict[str, Any] = {
        "comm_dtype": {"comm_dtype": torch.bfloat16},
        "mixed precision": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
    }.get(way, {})
    if engine == "flattening":
        with flattening():
            ours = _wrap("native", lazy=True, **options)
        plain = _wrap("native", lazy=False, **options)
    else:
        ours, plain = (_wrap(engine, lazy=lazy, **options) for lazy in (True, False))
    assert ours.plan() == plain.plan()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, plain)]
    for step in range(STEPS):
        if way == "hook" and step == 3:
            for model in (ours, plain):
                model.register_comm_hook(None, default_hooks.allreduce_hook)
        ours.require_manual_backward_finalization = step % 5 == 4
        for model in (ours, plain):
            if step % 3 == 2:
                with model.no_sync():
                    model(_x(rank, step)).square().mean().backward()
            model(_x(rank, step + 50), _used(rank, step)).square().mean().backward()
        if step % 5 == 4:
            ours.finalize_backward()
        assert_same_bits(_dense(ours), _dense(plain), f"{way}, step {step}")
        used = [model.reducer._get_local_used_map().tolist() for model in (ours, plain)]
        assert used[0] == used[1], (way, step)
        for optimizer in optimizers:
            optimizer.step()
            if step % 4 != 3:  # else the next gradients are added to these
                optimizer.zero_grad(set_to_none=step % 2 == 0)
    # A backward that raises; then two models in one graph.
    for model in (ours, plain):
        x = _x(rank, 0).requires_grad_()
        x.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x).sum().backward()
        model.zero_grad()
    other, other_plain = (_wrap(engine if engine != "flattening" else "native", lazy=lazy)
                          for lazy in (True, False))  # fmt: skip
    for step in range(3):
        for first, second in ((ours, other), (plain, other_plain)):
            second(first(_x(rank, step), _used(rank, step)), "02").square().mean().backward()
        assert_same_bits(_dense(ours), _dense(plain), f"{way}, first of two, {step}")
        assert_same_bits(_dense(other), _dense(other_plain), f"{way}, second of two, {step}")


def _dense(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients, and in rows where they are sparse."""
    got = gradients(model)
    return {n: g.to_dense() if g is not None and g.is_sparse else g for n, g in got.items()}


WAYS = ["plain", "hook", "comm_dtype", "mixed precision"]


@pytest.mark.parametrize("transport", slow_but_for(["shm"], TRANSPORTS))
@pytest.mark.parametrize("way", WAYS)
def test_the_bits_are_those_of_lasting_buckets(engine: str, transport: str, way: str) -> None:
    run_ranks(_same_bits, 2, engine, way, env=TRANSPORTS[transport])


@pytest.mark.parametrize("way", WAYS)
def test_the_same_where_a_bucket_is_filled_in_one_pass(way: str) -> None:
    if extension.load() is None:
        pytest.skip("that is the native engine")
    run_ranks(_same_bits, 2, "flattening", way)


def _wrapped(rank: int, world_size: int, engine: str) -> None:
    """`wrap` takes it too; a changed model's next reducer goes on with it, with or without."""
    ours = fastddp.wrap(nn.Linear(2, 2), engine=engine, lazy_bucket_allocation=rank == 0)
    for step in range(4):
        if step == 2:
            ours.weight = nn.Parameter(torch.zeros(2, 2))
        ours.zero_grad()
        ours(torch.full((1, 2), float(rank))).sum().backward()
        assert ours.weight.grad.tolist() == [[0.5, 0.5], [0.5, 0.5]]
        buckets = _buckets(ours)
        ours.zero_grad()
        assert _soon(lambda b=buckets: all(one.expired() for one in b) == (rank == 0))


def test_wrap_takes_it_and_ranks_may_differ(engine: str) -> None:
    run_ranks(_wrapped, 2, engine)
