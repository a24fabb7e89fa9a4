"""Gradients that travel in another dtype than their own: `comm_dtype`."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel.distributed import _MixedPrecision

import fastddp
from tests.conftest import flattening, require_native
from tests.parity.checks import bits, digest, gradients
from tests.ranks import run_ranks

NUM_ROUNDS = 4  # with the plan of the beginning, then the learned one

WIRES = [torch.bfloat16, torch.float16, torch.float32]


class Several(nn.Module):
    """Parameters of every dtype, some in other layouts than rows; one that only rank 0 uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 7))
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.image = nn.Parameter(torch.randn(2, 3, 3, 2).to(memory_format=torch.channels_last))
        self.vector = nn.Parameter(torch.randn(13))
        self.sixteen = nn.Parameter(torch.randn(9).half())
        self.brain = nn.Parameter(torch.randn(11).bfloat16())
        self.wide = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.pair = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.seldom = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, with_seldom: bool) -> Tensor:
        terms = [
            (param.abs() if param.is_complex() else param).float().sin().sum() * x
            for name, param in self.named_parameters()
            if with_seldom or name != "seldom"
        ]
        return torch.stack(terms).sum()


def _wire_of(grad: Tensor, wire: torch.dtype) -> torch.dtype:
    own = grad.dtype.to_real() if grad.is_complex() else grad.dtype
    return own if own == torch.float64 else wire


def _expected(by_rank: list[Tensor | None], like: Tensor, wire: torch.dtype) -> Tensor:
    """Scale in float, round to the wire's dtype, add there, round to the gradient's."""
    real = torch.view_as_real(like) if like.is_complex() else like
    total = None
    for grad in by_rank:
        mine = torch.zeros_like(like) if grad is None else grad
        mine = torch.view_as_real(mine) if mine.is_complex() else mine
        wide = mine if mine.dtype == torch.float64 else mine.float()
        if mine.dtype == _wire_of(like, wire):
            sent = mine * 0.5
        else:
            sent = (wide * 0.5).to(_wire_of(like, wire))
        total = sent if total is None else total + sent
    assert total is not None
    result = total.to(real.dtype)
    return torch.view_as_complex(result.contiguous()) if like.is_complex() else result


def _compare(rank: int, world_size: int, engines: list[str], wire: torch.dtype) -> list[str]:
    name = engines[rank]
    digests = []
    with flattening() if name == "flattening" else nullcontext():
        model = Several()
        ours = fastddp.DistributedDataParallel(
            model,
            comm_dtype=wire,
            engine="native" if name == "flattening" else name,
            bucket_cap_mb=1e-4,
        )
        for step in range(NUM_ROUNDS):
            local = []
            for other in range(world_size):
                alone = copy.deepcopy(model)
                alone.zero_grad()
                alone(torch.tensor(1.0 + other + step), other == 0).backward()
                local.append(dict(alone.named_parameters()))
            ours.zero_grad(set_to_none=step % 2 == 0)
            ours(torch.tensor(1.0 + rank + step), rank == 0).backward()
            for param_name, param in model.named_parameters():
                want = _expected([grads[param_name].grad for grads in local], param.detach(), wire)
                assert param.grad.dtype == param.dtype
                assert param.grad.stride() == param.stride()
                where = f"{param_name}, step {step}"
                assert bits(param.grad.contiguous()) == bits(want.contiguous()), where
            digests.append(digest(gradients(model)))
        sizes = {p.dtype: 0 for p in model.parameters()}
        assert ours.stats().bytes_per_round > 0
        assert len(sizes) > 1
    return digests


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize(
    "engines",
    [["native"] * 2, ["python"] * 2, ["flattening"] * 2, ["native", "python"]],
    ids="-".join,
)
def test_the_average_is_rounded_as_promised(engines: list[str], wire: torch.dtype) -> None:
    if engines != ["python"] * 2:
        require_native()
    first, second = run_ranks(_compare, 2, engines, wire)
    assert first == second


def _half_the_bytes(rank: int, world_size: int, engine: str) -> tuple[int, int]:
    def after_a_step(comm_dtype: torch.dtype | None) -> int:
        model = nn.Linear(64, 64)
        ours = fastddp.DistributedDataParallel(model, comm_dtype=comm_dtype, engine=engine)
        ours(torch.randn(2, 64)).sum().backward()
        return ours.stats().bytes_per_round

    return after_a_step(None), after_a_step(torch.bfloat16)


def test_half_the_bytes_travel(engine: str) -> None:
    for whole, half in run_ranks(_half_the_bytes, 2, engine):
        assert whole >= 64 * 65 * 4
        assert 64 * 65 * 2 <= half <= whole / 2 + 32


def _around(rank: int, world_size: int, engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    ours = fastddp.DistributedDataParallel(model, comm_dtype=torch.bfloat16, engine=engine)
    x = torch.full((1, 4), 1.0 + rank)
    with ours.no_sync():
        ours(x).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((4, 4), 1.0 + rank))
    ours(x).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((4, 4), 3.0)), "2 * (1 + 2) / 2"
    # A gradient that bfloat16 cannot hold arrives whole through a hook.
    model.zero_grad()
    odd = 1.0 + 2.0**-20
    ours.register_comm_hook(None, allreduce_hook)
    ours(torch.full((1, 4), odd)).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((4, 4), odd))


def test_around_backward(engine: str) -> None:
    run_ranks(_around, 2, engine)


def _refuse(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"comm_dtype must be .* got torch\.int32"):
        fastddp.wrap(nn.Linear(2, 2), comm_dtype=torch.int32)
    mixed = _MixedPrecision(reduce_dtype=torch.float16)
    with pytest.raises(ValueError, match="both say how gradients travel"):
        fastddp.wrap(nn.Linear(2, 2), comm_dtype=torch.bfloat16, mixed_precision=mixed)
    dist.barrier()
    with pytest.raises(fastddp.MismatchError, match="comm_dtype"):
        fastddp.wrap(nn.Linear(2, 2), comm_dtype=torch.bfloat16 if rank else None)


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    run_ranks(_refuse, 2)
