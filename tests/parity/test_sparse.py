"""Sparse gradients of embeddings: torch's values, and no cost where a rank has none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.parity.checks import wrap_small
from tests.ranks import run_ranks


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 3, sparse=True)
        self.bags = nn.EmbeddingBag(7, 3, mode="sum", sparse=True)
        self.layer = nn.Linear(3, 2)

    def forward(self, tokens: Tensor, with_bags: bool = True) -> Tensor:
        total = self.words(tokens).sum(1)
        if with_bags:
            total = total + self.bags(tokens % 7)
        return self.layer(total)


def _tokens(rank: int, step: int) -> Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def _dense(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.to_dense() for p in model.parameters()]


def _beside_torch(rank: int, world_size: int, engine: str) -> None:
    ours, theirs = wrap_small(Words(), engine), TorchDDP(Words())
    optimizers = [
        (
            torch.optim.SparseAdam([m.module.words.weight, m.module.bags.weight]),
            torch.optim.SGD(m.module.layer.parameters(), lr=0.1),
        )
        for m in (ours, theirs)
    ]
    for step in range(4):
        for model, pair in zip((ours, theirs), optimizers, strict=True):
            for optimizer in pair:
                optimizer.zero_grad()
            model(_tokens(rank, step)).square().sum().backward()
        assert ours.module.words.weight.grad.is_sparse
        for got, want in zip(_dense(ours), _dense(theirs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        for pair in optimizers:
            for optimizer in pair:
                optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_gradients_are_torchs(engine: str) -> None:
    run_ranks(_beside_torch, 2, engine)


def _used_here_or_there(rank: int, world_size: int, engine: str) -> None:
    """In step 0 and 3 on all ranks, in 1 on none, in 2 on the last alone."""
    model = wrap_small(Words(), engine)
    for step, users in enumerate((range(world_size), (), (world_size - 1,), range(world_size))):
        model.zero_grad()
        model(_tokens(0, step), rank in users).sum().backward()
        grad = model.module.bags.weight.grad
        alone = Words()
        alone.load_state_dict(model.module.state_dict())
        alone(_tokens(0, step)).sum().backward()
        if not users:
            assert grad is None, step
        else:
            share = len(users) / world_size
            torch.testing.assert_close(
                grad.to_dense(), share * alone.bags.weight.grad.to_dense(), msg=str(step)
            )


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_embedding_may_be_used_by_some_ranks(world_size: int, engine: str) -> None:
    run_ranks(_used_here_or_there, world_size, engine)


def _kept(rank: int, world_size: int, engine: str) -> None:
    model = wrap_small(Words(), engine)
    model(_tokens(rank, 0)).sum().backward()
    kept = model.module.bags.weight.grad.to_dense()
    model(_tokens(rank, 1), with_bags=False).sum().backward()
    assert torch.equal(model.module.bags.weight.grad.to_dense(), kept)


def test_what_no_rank_used_is_kept(engine: str) -> None:
    run_ranks(_kept, 2, engine)


def _accumulating(rank: int, world_size: int, engine: str) -> None:
    ours, theirs = wrap_small(Words(), engine), TorchDDP(Words())
    for model in (ours, theirs):
        with model.no_sync():
            model(_tokens(rank, 0)).sum().backward()
        model(_tokens(rank, 1)).sum().backward()
    for got, want in zip(_dense(ours), _dense(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_no_sync(engine: str) -> None:
    run_ranks(_accumulating, 2, engine)


class Tied(nn.Module):
    """One weight with a sparse gradient from below and a dense one from above."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(5, 3, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) @ self.words.weight.t()


def _tied(rank: int, world_size: int, engine: str) -> None:
    model, alone = fastddp.wrap(Tied(), engine=engine), Tied()
    tokens = torch.tensor([[1, 2], [3, rank]])
    for _ in range(2):
        model.zero_grad()
        model(tokens).sum().backward()
    for other in range(world_size):
        (alone(torch.tensor([[1, 2], [3, other]])).sum() / world_size).backward()
    torch.testing.assert_close(model.words.weight.grad.to_dense(), alone.words.weight.grad)


def test_dense_and_sparse_gradients_of_one_weight(engine: str) -> None:
    run_ranks(_tied, 2, engine)


def _hooked(rank: int, world_size: int, engine: str) -> list[bool]:
    ours, plain = wrap_small(Words(), engine), wrap_small(Words(), engine)
    kinds: list[bool] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        kinds.append(bucket.buffer().is_sparse)
        assert len(bucket.gradients()) == len(bucket.parameters())
        return default_hooks.allreduce_hook(None, bucket)

    del hook.__annotations__["bucket"], hook.__annotations__["return"]
    ours.register_comm_hook(None, hook)
    for model in (ours, plain):
        model(_tokens(rank, 0)).sum().backward()
    for got, want in zip(_dense(ours), _dense(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    return kinds


def test_a_hook_gets_each_sparse_gradient_as_a_bucket(engine: str) -> None:
    for kinds in run_ranks(_hooked, 2, engine):
        assert kinds.count(True) == 2
        assert kinds == sorted(kinds), "dense ones first"


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(_, weight):
        return weight.sum()

    @staticmethod
    def backward(_, grad):
        return torch.ones(4).to_sparse() * grad


class Surprise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self) -> Tensor:
        return Custom.apply(self.weight)


def _surprise_here(rank: int, world_size: int, engine: str) -> None:
    """On one rank alone, between buckets that the other ranks wait for."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(2, 2), Surprise(), nn.Linear(2, 2)])
    wrapped = fastddp.wrap(model, engine=engine, bucket_cap_mb=1e-6)
    for step in range(3):
        for param in model.parameters():
            param.grad = None
        first, surprise, last = model
        middle = surprise() if rank == 1 and step == 1 else surprise.weight.sum()
        total = (last(first(torch.ones(1, 2))) * middle).sum()
        if rank == 1 and step == 1:
            with pytest.raises(TypeError, match="got a sparse gradient"):
                total.backward()
        else:
            total.backward()
    assert wrapped.stats().rounds == (2 if rank == 1 else 3)


def test_the_other_ranks_do_not_wait_for_one_that_was_refused(engine: str) -> None:
    run_ranks(_surprise_here, 2, engine)


def _surprise(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(Surprise(), engine=engine)
    with pytest.raises(TypeError, match=rf"rank {rank}: parameter 'weight' got a sparse gradient"):
        model().backward()


def test_a_sparse_gradient_of_another_module_is_refused_by_name(engine: str) -> None:
    run_ranks(_surprise, 2, engine)
