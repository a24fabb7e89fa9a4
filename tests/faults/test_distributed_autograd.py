"""A backward over RPC, whose gradients the engines cannot see, is refused instead of left alone."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import autograd as distributed_autograd
from torch.distributed import rpc

import fastddp
from tests.ranks import run_ranks, scratch_folder

pytestmark = pytest.mark.skipif(not rpc.is_available(), reason="this torch has no RPC")


def refuses_inside_only(rank: int, world_size: int, engine: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{scratch_folder()}/rpc")
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
    model = fastddp.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False), engine=engine)
    inputs = torch.full((1, 2), float(rank))
    with distributed_autograd.context():
        with pytest.raises(NotImplementedError, match=r"distributed\.autograd\.context"):
            model(inputs)
        with torch.no_grad():
            model(inputs)
    model(inputs).sum().backward()
    torch.testing.assert_close(model.module.weight.grad, torch.full((1, 2), 0.5))
    rpc.shutdown()


def test_refused_inside_its_context_only(engine: str) -> None:
    run_ranks(refuses_inside_only, 2, engine)
