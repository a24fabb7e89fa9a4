"""Distributed autograd: what a backward over RPC leaves in its context is averaged there."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import autograd as distributed_autograd
from torch.distributed import rpc
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits
from tests.ranks import init_group, run_ranks, scratch_folder

pytestmark = pytest.mark.skipif(not rpc.is_available(), reason="this torch has no RPC")


class Words(nn.Module):
    """A sparse gradient, dense ones, and some that a call leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, sparse=True)
        self.proj = nn.Linear(3, 2)
        self.extra = nn.Linear(2, 2)

    def forward(self, index: Tensor, extra: bool = True) -> Tensor:
        y = self.proj(self.embed(index))
        return self.extra(y) if extra else y


def _start_rpc(rank: int, world_size: int) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{scratch_folder()}/rpc")
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)


def _by_name(model: nn.Module, context: int) -> dict[str, Tensor]:
    gradients = distributed_autograd.get_gradients(context)
    return {name: gradients[p].clone() for name, p in model.named_parameters() if p in gradients}


def _as_dense(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (g.to_dense() if g.is_sparse else g).contiguous() for n, g in gradients.items()}


def _manual(rank: int, world_size: int, engine: str) -> None:
    _start_rpc(rank, world_size)
    model = fastddp.DistributedDataParallel(nn.Linear(1, 1, bias=False), engine=engine)
    x = torch.full((1, 1), 2.0 * rank)
    model.require_manual_backward_finalization = True
    with (
        distributed_autograd.context(),
        pytest.raises(NotImplementedError, match="require_manual_backward_finalization"),
    ):
        model(x)
    model.require_manual_backward_finalization = False
    with distributed_autograd.context() as context:
        distributed_autograd.backward(context, [model(x).sum()])
        got = distributed_autograd.get_gradients(context)[model.module.weight]
        assert got.tolist() == [[1.0]]
    rpc.shutdown()


def test_it_cannot_be_finalized_by_hand(engine: str) -> None:
    run_ranks(_manual, 2, engine)


def _averages(rank: int, world_size: int, engine: str) -> None:
    _start_rpc(rank, world_size)
    words = Words()
    makers: tuple[Any, ...] = (
        TorchDDP,
        lambda m: fastddp.DistributedDataParallel(m, engine=engine, bucket_cap_mb=2e-5),
        lambda m: fastddp.wrap(m, engine=engine),
    )
    index = torch.tensor([0, rank + 1])
    seen: list[list[dict[str, Tensor]]] = []
    for make in makers:
        torch.manual_seed(0)
        words = Words()
        model = make(words)
        own = {p: torch.full_like(p, 7.0) for p in words.parameters()}
        of_maker = []
        for step in range(3):
            for p, grad in own.items():
                p.grad = grad
            with distributed_autograd.context() as context:
                loss = model(index).square().sum() * (rank + step + 1)
                distributed_autograd.backward(context, [loss])
                of_maker.append(_by_name(words, context))
                # Another one adds to it, here through the other worker.
                there = rpc.rpc_sync(f"worker{1 - rank}", torch.mul, (model(index), rank + 2.0))
                distributed_autograd.backward(context, [there.sum()])
                of_maker.append(_by_name(words, context))
            for p, grad in own.items():
                assert p.grad is grad, "`.grad` is left alone"
                assert (grad == 7.0).all()
        seen.append(of_maker)
    for got in seen[1:]:
        for mine, torchs in zip(got, seen[0], strict=True):
            assert mine["embed.weight"].is_sparse
            mine, torchs = _as_dense(mine), _as_dense(torchs)
            assert_same_bits(mine, torchs, "as torch's class")
    rpc.shutdown()


@pytest.mark.parametrize("shm", ["0", "1"])
def test_a_context_has_the_mean(shm: str, engine: str) -> None:
    run_ranks(_averages, 2, engine, env={"FASTDDP_SHM": shm})


def _among_others(rank: int, world_size: int, engine: str) -> None:
    """Backwards of other sorts, inside a context and between two."""
    _start_rpc(rank, world_size)
    ladder = Ladder()
    model = fastddp.DistributedDataParallel(ladder, engine=engine, bucket_cap_mb=16 / 2**20)

    def assert_context(context: int, x: float, what: str) -> None:
        plain = Ladder()
        for name, p in plain.named_parameters():
            p.grad = _by_name(ladder, context)[name]
        assert_ladder(plain, x, what)

    for step in range(4):
        x, mean = ladder_x(rank, step, world_size), mean_x(step, world_size)
        model.zero_grad()
        with distributed_autograd.context() as context:
            model(x).backward()  # an ordinary one
            assert_ladder(ladder, mean, "ordinary, inside")
            assert not distributed_autograd.get_gradients(context)
            torch.autograd.grad(model(x), list(ladder.parameters()))
            assert_ladder(ladder, mean, "after autograd.grad()")
            with model.no_sync():
                distributed_autograd.backward(context, [model(x)])
            assert_context(context, x, "no_sync")
            distributed_autograd.backward(context, [model(x)])
            assert_context(context, 2 * mean, "what no_sync left, too")
            with torch.no_grad():
                model(x)
        assert_ladder(ladder, mean, "`.grad` is the ordinary backward's")
        model(x).backward()
        assert_ladder(ladder, 2 * mean, "outside")

    # One that raises on all ranks.
    with distributed_autograd.context() as context:
        loss = model(2.0)
        handle = ladder.a.register_hook(_fail)
        with pytest.raises(RuntimeError, match="Error on Node"):
            distributed_autograd.backward(context, [loss])
        handle.remove()
    model(x)  # torch may let go of what raised in another thread: the next forward waits for it
    assert_ladder(ladder, 2 * mean, "`.grad` is put back")
    with distributed_autograd.context() as context:
        distributed_autograd.backward(context, [model(x)])
        assert_context(context, mean, "after one that raised")
    rpc.shutdown()


def _fail(_: Tensor) -> None:
    raise RuntimeError("raised by this test")


def test_backwards_of_all_sorts(engine: str) -> None:
    run_ranks(_among_others, 2, engine)


def _unused(rank: int, world_size: int, engine: str) -> None:
    _start_rpc(rank, world_size)
    words = Words()
    model = fastddp.wrap(words, engine=engine)
    index = torch.tensor([0])
    with distributed_autograd.context() as context:  # unused by all
        distributed_autograd.backward(context, [model(index, extra=False).sum()])
        assert set(_by_name(words, context)) == {"embed.weight", "proj.weight", "proj.bias"}
    with distributed_autograd.context() as context:  # by one: its context has no place for the mean
        loss = model(index, extra=rank == 0).sum()
        if rank == 0:
            distributed_autograd.backward(context, [loss])
        else:
            with pytest.raises(RuntimeError, match=r"rank 1: .* no gradient for .*'extra\.\w+'"):
                distributed_autograd.backward(context, [loss])
    assert all(p.grad is None for p in words.parameters())
    with distributed_autograd.context() as context:
        distributed_autograd.backward(context, [model(index).sum() * rank])
        assert _by_name(words, context)["extra.bias"].tolist() == [0.5, 0.5]

    delayed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ours = fastddp.wrap(
        delayed,
        engine=engine,
        delay_all_reduce_named_params=[("0.weight", delayed[0].weight)],
        param_to_hook_all_reduce=delayed[1].weight,
    )
    with distributed_autograd.context():
        with pytest.raises(NotImplementedError, match="delay_all_reduce_named_params"):
            ours(torch.ones(1, 2))
        with torch.no_grad():
            ours(torch.ones(1, 2))
    rpc.shutdown()


def test_what_a_context_cannot_hold_is_told(engine: str) -> None:
    run_ranks(_unused, 2, engine)


def _never_ends(rank: int, world_size: int, engine: str) -> None:
    init_group("gloo", timeout_s=2.0)
    model = fastddp.wrap(Ladder(), engine=engine)
    model._replica.is_lent = True  # as while a backward runs, and after it until torch lets go
    with pytest.raises(RuntimeError, match=rf"rank {rank}: .* within 2 s, the process group's tim"):
        model(1.0)
    threading.Timer(0.2, lambda: setattr(model._replica, "is_lent", False)).start()
    model(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(model.module, mean_x(0, world_size), "once it has ended")


def test_a_forward_waits_for_the_end_of_a_backward_for_the_group_s_timeout(engine: str) -> None:
    run_ranks(_never_ends, 2, engine, init_group=False)
