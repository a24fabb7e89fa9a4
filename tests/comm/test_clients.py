"""What trains over a backend: torch's wrappers, optimizers and tensors, and fastddp itself.

The expected parameters are those of one process that trains on the whole batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastddp
from tests.comm.common import expect, run_group
from tests.ranks import scratch_folder
from tests.slow import slow_but_for

STEPS = 5
BATCH = 12  # divides by 2, 3 and 4 ranks
LEARNING_RATE = 0.1


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 3)
    ).double()


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 7, generator=generator, dtype=torch.float64)
    targets = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    return inputs, targets


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> None:
    for step in range(STEPS):
        inputs, targets = _batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()


def _trained_alone() -> dict[str, torch.Tensor]:
    model = _model()
    _train(model, _adam(model.parameters()), slice(None))
    return model.state_dict()


def _rows(rank: int, world_size: int) -> slice:
    share = BATCH // world_size
    return slice(rank * share, (rank + 1) * share)


def _compare(trained: dict[str, torch.Tensor]) -> None:
    """Equal to training alone up to rounding in float64, which Adam's division magnifies."""
    expected = _trained_alone()
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def _ddp(rank: int, world_size: int) -> None:
    model = _model()
    if rank != 0:  # rank 0's parameters are everyone's
        for parameter in model.parameters():
            parameter.data.zero_()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-3, gradient_as_bucket_view=True)
    _train(wrapped, _adam(wrapped.parameters()), _rows(rank, world_size))
    _compare(model.state_dict())
    for value in model.state_dict().values():
        others = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(others, value)
        for other in others:
            expect(other, value)


def _ddp_finding_unused_parameters(rank: int, world_size: int) -> None:
    model = _model()
    model.register_module("unused", nn.Linear(2, 2).double())
    forward = nn.Sequential(*list(model.children())[:-1])
    model.forward = forward.forward  # type: ignore[method-assign]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    used = [p for name, p in model.named_parameters() if not name.startswith("unused")]
    _train(wrapped, _adam(used), _rows(rank, world_size))
    _compare({k: v for k, v in model.state_dict().items() if not k.startswith("unused")})


def _ddp_with_a_python_hook(rank: int, world_size: int) -> None:
    """A hook that returns the future of a collective, with a callback behind it."""

    def hook(state, bucket):  # DDP compares annotations, which are strings here
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / world_size)

    wrapped = DistributedDataParallel(_model(), bucket_cap_mb=1e-3)
    wrapped.register_comm_hook(None, hook)
    _train(wrapped, _adam(wrapped.parameters()), _rows(rank, world_size))
    _compare(wrapped.module.state_dict())


def _ddp_with_power_sgd(rank: int, world_size: int) -> None:
    """A hook whose callbacks start further collectives and wait; ranks stay equal, loss falls."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd

    model = _model().float()
    wrapped = DistributedDataParallel(model)
    state = power_sgd.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
    wrapped.register_comm_hook(state, power_sgd.powerSGD_hook)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    inputs, targets = (x.float() for x in _batch(0))
    rows = _rows(rank, world_size)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(wrapped(inputs[rows]), targets[rows])
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.data, op=dist.ReduceOp.AVG)
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    for value in model.state_dict().values():
        others = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(others, value)
        for other in others:
            expect(other, value)


def _ddp_join(rank: int, world_size: int) -> None:
    """Ranks with fewer batches shadow the collectives of the others."""
    wrapped = DistributedDataParallel(_model())
    optimizer = _adam(wrapped.parameters())
    steps = 2 + rank
    with wrapped.join():
        for step in range(steps):
            inputs, targets = _batch(step)
            optimizer.zero_grad()
            nn.functional.mse_loss(wrapped(inputs), targets).backward()
            optimizer.step()
    totals = [torch.empty(1, dtype=torch.float64) for _ in range(world_size)]
    total = sum(p.sum() for p in wrapped.parameters()).detach().reshape(1)
    dist.all_gather(totals, total)
    # The model of the last to join is everyone's.
    for other in totals:
        expect(other, total)


def _zero(rank: int, world_size: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DistributedDataParallel(_model())
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=LEARNING_RATE)
    _train(wrapped, optimizer, _rows(rank, world_size))
    _compare(wrapped.module.state_dict())
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        assert len(optimizer.state_dict()["state"]) == len(list(wrapped.parameters()))


def _fsdp2(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model()
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, _adam(model.parameters()), _rows(rank, world_size))
    _compare({name: value.full_tensor() for name, value in model.state_dict().items()})


def _fsdp1(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(_model(), device_id=torch.device("cpu"))
    _train(model, _adam(model.parameters()), _rows(rank, world_size))
    with FullyShardedDataParallel.summon_full_params(model):
        trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    _compare({name.removeprefix("_fsdp_wrapped_module."): v for name, v in trained.items()})


def _hybrid(rank: int, world_size: int) -> None:
    """Replicated over one dimension of a mesh, sharded over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    _train(model, _adam(model.parameters()), _rows(rank, world_size))
    _compare({name: value.full_tensor() for name, value in model.state_dict().items()})


def _dtensor(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(30.0).view(6, 5)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    expect(sharded.full_tensor(), whole)
    expect((sharded.redistribute(mesh, [Shard(1)]) * 2).full_tensor(), 2 * whole)
    product = distribute_tensor(whole.t().contiguous(), mesh, [Shard(1)]) @ sharded
    expect(product.redistribute(mesh, [Replicate()]).to_local(), whole.t() @ whole)


def _checkpoint(rank: int, world_size: int) -> None:
    """torch.distributed.checkpoint plans by collectives of objects."""
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(30.0).view(6, 5)
    folder = str(scratch_folder() / "checkpoint")
    checkpoint.save({"x": distribute_tensor(whole, mesh, [Shard(0)])}, checkpoint_id=folder)
    loaded = {"x": distribute_tensor(torch.zeros(6, 5), mesh, [Shard(1)])}
    checkpoint.load(loaded, checkpoint_id=folder)
    expect(loaded["x"].full_tensor(), whole)


def _fastddp(rank: int, world_size: int) -> None:
    model = _model()
    wrapped = fastddp.wrap(model)
    _train(wrapped, _adam(wrapped.parameters()), _rows(rank, world_size))
    _compare(copy.deepcopy(model.state_dict()))


@pytest.mark.parametrize("world_size", slow_but_for([2], [2, 3]))
@pytest.mark.parametrize(
    "client",
    [
        _ddp,
        _ddp_finding_unused_parameters,
        _ddp_with_a_python_hook,
        _ddp_with_power_sgd,
        _ddp_join,
        _zero,
        _fsdp2,
        _fsdp1,
        _dtensor,
        _checkpoint,
        _fastddp,
    ],
)
def test_client(backend: str, client: Callable[[int, int], None], world_size: int):
    run_group(client, world_size, backend)


def test_hybrid_sharding(backend):
    run_group(_hybrid, 4, backend)
