"""Uneven inputs: the ranks that still have some go on, and all end with one model."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import fastddp
from tests.models import Ladder
from tests.parity.checks import assert_same_bits, digest, small_cap_mb, wrap_small
from tests.ranks import run_ranks


def _build(batch_norm: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 2))


def _inputs(rank: int, step: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def _num_inputs(rank: int, world_size: int, first_has_most: bool) -> int:
    return 2 + 2 * (world_size - rank if first_has_most else rank)


def _train(model: nn.Module, rank: int, num: int, by_initial: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with model.join(divide_by_initial_world_size=by_initial):
        for step in range(num):
            optimizer.zero_grad()
            model(_inputs(rank, step)).square().sum().backward()
            optimizer.step()


def _beside_torch(
    rank: int, world_size: int, engine: str, batch_norm: bool, by_initial: bool, first_most: bool
) -> str:
    num = _num_inputs(rank, world_size, first_most)
    ours = wrap_small(_build(batch_norm), engine)
    theirs = TorchDDP(_build(batch_norm))
    _train(ours, rank, num, by_initial)
    _train(theirs, rank, num, by_initial)
    assert_same_bits(ours.state_dict(), theirs.state_dict(), "after all inputs")
    end = digest(ours.state_dict())
    # Outside of the context all is as before.
    for model in (ours, theirs):
        model.zero_grad()
        model(_inputs(rank, 99)).sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    return end


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("by_initial", [False, True])
@pytest.mark.parametrize("first_most", [False, True])
def test_uneven_inputs_give_torchs_model(
    engine: str, batch_norm: bool, by_initial: bool, first_most: bool
) -> None:
    by_rank = run_ranks(_beside_torch, 2, engine, batch_norm, by_initial, first_most)
    assert by_rank[0] == by_rank[1]


def _no_inputs_at_all(rank: int, world_size: int, engine: str) -> str:
    """Rank 0, which decides the order of buckets, never runs a backward."""
    model = fastddp.wrap(_build(False), engine=engine, bucket_cap_mb=1e-4)
    with model.join():
        for step in range(3 * rank):
            model.zero_grad()
            model(_inputs(rank, step)).sum().backward()
    return digest(dict(model.state_dict()))


def test_ranks_without_any_input(engine: str) -> None:
    assert len(set(run_ranks(_no_inputs_at_all, 3, engine))) == 1


def _different_parts(rank: int, world_size: int, engine: str) -> None:
    """Exact averages: a joined rank counts as zero, and unused parameters keep no gradient."""
    ladder = Ladder()
    model = fastddp.wrap(ladder, engine=engine, bucket_cap_mb=small_cap_mb(ladder))
    with model.join(divide_by_initial_world_size=False):
        for step in range(2 + 3 * rank):
            model.zero_grad()
            used = "ab" if step % 2 else "bc"
            model(2.0, used).backward()
            for name in Ladder.NAMES:
                grad = model.get_parameter(name).grad
                if name in used:
                    assert grad.unique().tolist() == [2.0 * Ladder.factor(name)], (step, name)
                else:
                    assert grad is None, (step, name)


def test_the_average_is_over_those_that_have_inputs(engine: str) -> None:
    run_ranks(_different_parts, 2, engine)


def _accumulating(rank: int, world_size: int, engine: str) -> str:
    model = fastddp.wrap(_build(False), engine=engine)
    with model.join():
        for step in range(4 + 4 * rank):
            if step % 2 == 0:
                with model.no_sync():
                    model(_inputs(rank, step)).sum().backward()
            else:
                model(_inputs(rank, step)).sum().backward()
    return digest(dict(model.state_dict()))


def test_no_sync_in_the_context(engine: str) -> None:
    assert len(set(run_ranks(_accumulating, 2, engine))) == 1


def _decided_at_forward(rank: int, world_size: int, engine: str) -> str:
    """The forward is outside of `no_sync`, or of `accumulate`: the joined ranks were told then."""
    model = fastddp.wrap(_build(False), engine=engine)
    with model.join():
        for step in range(4 + 4 * rank):
            total = model(_inputs(rank, step)).sum()
            with fastddp.accumulate(model, 2):
                total.backward()
    assert model.require_backward_grad_sync
    model.zero_grad()
    with model.no_sync():
        model(_inputs(rank, 99)).sum().backward()
    assert model.stats().rounds == 8, "once more it is decided at backward"
    return digest(dict(model.state_dict()))


def test_in_the_context_the_forward_decides(engine: str) -> None:
    assert len(set(run_ranks(_decided_at_forward, 2, engine))) == 1


def _evaluating(rank: int, world_size: int, engine: str) -> str:
    """Those that still have inputs run a forward without grad mode, too, between the others."""
    model = fastddp.wrap(_build(True), engine=engine)
    with model.join():
        for step in range(2 + 3 * rank):
            model.zero_grad()
            model(_inputs(rank, step)).sum().backward()
            with torch.no_grad():
                model(_inputs(rank, 50 + step))
    assert model.stats().rounds == 2 + 3 * (world_size - 1)
    return digest(dict(model.state_dict()))


def test_evaluation_in_the_context(engine: str) -> None:
    assert len(set(run_ranks(_evaluating, 2, engine))) == 1


def _copied(rank: int, world_size: int, engine: str, data: bytes) -> str:
    """Its ranks have yet to meet in shared memory, and one of them has run out before that."""
    model = pickle.loads(data)
    with model.join():
        for step in range(3 * rank):
            model.zero_grad()
            model(_inputs(rank, step)).sum().backward()
    return digest(dict(model.state_dict()))


def _pickled(rank: int, world_size: int, engine: str) -> bytes:
    return pickle.dumps(fastddp.wrap(_build(True), engine=engine))


def test_a_copy_in_the_context(engine: str) -> None:
    data = run_ranks(_pickled, 2, engine)[0]
    assert len(set(run_ranks(_copied, 2, engine, data))) == 1


def _early_termination(rank: int, world_size: int, engine: str) -> int:
    model = fastddp.wrap(_build(True), engine=engine)
    done = []

    def train() -> None:
        with model.join(throw_on_early_termination=True):
            for step in range(2 + rank):
                model(_inputs(rank, step)).sum().backward()
                done.append(step)

    with pytest.raises(RuntimeError, match="exhausted"):
        train()
    return len(done)


def test_it_can_stop_when_the_first_rank_runs_out(engine: str) -> None:
    assert run_ranks(_early_termination, 2, engine) == [2, 2]


def _with_zero(rank: int, world_size: int, engine: str) -> str:
    """Each rank steps its share of the parameters, also one that has run out of inputs.

    That one then has the other ranks' gradients. (Torch's class leaves it its own last ones.)
    """
    digests = []
    for zero in (True, False):
        model = wrap_small(_build(False), engine)
        params = model.parameters()
        if zero:
            optimizer = ZeroRedundancyOptimizer(params, torch.optim.Adam, lr=0.01)
        else:
            optimizer = torch.optim.Adam(params, lr=0.01)
        with Join([model, optimizer] if zero else [model]):
            for step in range(3 + 2 * rank):
                optimizer.zero_grad()
                model(_inputs(rank, step)).square().sum().backward()
                optimizer.step()
        digests.append(digest(model.state_dict()))
    assert digests[0] == digests[1]
    return digests[0]


def test_together_with_an_optimizer_that_joins(engine: str) -> None:
    assert len(set(run_ranks(_with_zero, 2, engine))) == 1


def _disabled(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.wrap(_build(True), engine=engine)
    with warnings.catch_warnings(), model.join(enable=False):
        for step in range(2):
            model(_inputs(rank, step)).sum().backward()


def test_it_can_be_switched_off(engine: str) -> None:
    run_ranks(_disabled, 2, engine)
