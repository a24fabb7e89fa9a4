"""Ranks on two GPUs: against torch's class on NCCL, and whether communication overlaps backward.

Ranks are spawned, not forked: CUDA does not survive a fork. A rank's function does all of one test,
since a rank takes seconds to start.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import fastddp
from tests.gpu.common import TWO_GPUS, device_events, is_kernel
from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, small_cap_mb

pytestmark = [*TWO_GPUS, pytest.mark.timeout(180)]

WORLD, STEPS = 2, 4
TorchDDP = nn.parallel.DistributedDataParallel


def run(function: Any, *args: object) -> list[Any]:
    return fastddp.spawn(function, WORLD, args, timeout_s=60)


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def wrap_both(
    name: str, engine: str, **options: Any
) -> tuple[TorchDDP, fastddp.DistributedDataParallel]:
    case = CASES[name]
    cap_mb = small_cap_mb(case.build())
    theirs = TorchDDP(
        case.build().to(here()), bucket_cap_mb=cap_mb, find_unused_parameters=case.has_unused
    )
    ours = fastddp.DistributedDataParallel(
        case.build().to(here()), bucket_cap_mb=cap_mb, engine=engine, **options
    )
    return theirs, ours


def batch(name: str, rank: int, step: int) -> list[Tensor]:
    return [tensor.to(here()) for tensor in CASES[name].inputs(rank, step)]


def gathered(tensor: Tensor) -> list[Tensor]:
    tensors = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors


def assert_same_on_all_ranks(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if param.grad is not None:
            first, second = gathered(
                torch.view_as_real(param.grad) if param.is_complex() else param.grad
            )
            assert torch.equal(first, second), name


def _models(rank: int, engine: str, names: list[str]) -> None:
    torch.backends.cudnn.deterministic = True
    for name in names:
        theirs, ours = wrap_both(name, engine)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (theirs, ours)]
        for step in range(STEPS):
            for model, optimizer in zip((theirs, ours), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model(*batch(name, rank, step))).backward()
            pairs = zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True)
            for (param_name, mine), due in pairs:
                what = f"{name}, step {step}, {param_name}"
                assert (mine.grad is None) == (due.grad is None), what
                if mine.grad is not None:
                    # Two terms have one sum; what differs is what kernels of the model computed.
                    torch.testing.assert_close(
                        mine.grad, due.grad, msg=lambda text, what=what: f"{what}: {text}"
                    )
            assert_same_on_all_ranks(ours)
            for optimizer in optimizers:
                optimizer.step()
        for mine, due in zip(ours.module.buffers(), theirs.module.buffers(), strict=True):
            torch.testing.assert_close(mine, due)
        assert ours.stats().rounds == STEPS


def test_gradients_and_buffers_are_those_of_torchs_class(engine: str) -> None:
    run(_models, engine, list(CASES))


def _exact(rank: int, engine: str) -> None:
    """Whole numbers, which no order of summation rounds; the ranks use different parameters."""
    model = fastddp.DistributedDataParallel(
        Ladder().to(here()), engine=engine, bucket_cap_mb=small_cap_mb(Ladder())
    )
    used = ["ab", "bce"]
    for step in range(STEPS):
        model.zero_grad()
        model(ladder_x(rank, step, WORLD), used=used[rank]).backward()
        want: dict[str, float | None] = {
            name: mean_x(step, WORLD, [r for r in range(WORLD) if name in used[r]]) or None
            for name in Ladder.NAMES
        }
        assert_ladder(model.module, want, f"step {step}")
    model.zero_grad()
    with model.no_sync():
        model(ladder_x(rank, 0, WORLD)).backward()
        assert_ladder(model.module, ladder_x(rank, 0, WORLD), "not synchronised")
    model(ladder_x(rank, 1, WORLD)).backward()
    assert_ladder(model.module, mean_x(0, WORLD) + mean_x(1, WORLD), "accumulated")


def test_ranks_may_use_different_parameters_and_accumulate(engine: str) -> None:
    run(_exact, engine)


def _hooks(rank: int, engine: str) -> None:
    theirs, ours = wrap_both("mlp", engine)
    for model in (theirs, ours):
        model.register_comm_hook(dist.group.WORLD, default_hooks.bf16_compress_hook)
    cast = wrap_both("mlp", engine, comm_dtype=torch.bfloat16)[1]
    for step in range(STEPS):
        for model in (theirs, ours, cast):
            model.zero_grad()
            loss_of(model(*batch("mlp", rank, step))).backward()
        for mine, due, quick in zip(
            ours.parameters(), theirs.parameters(), cast.parameters(), strict=True
        ):
            assert torch.equal(mine.grad, due.grad), f"step {step}"
            assert quick.grad.dtype == torch.float32
            # Two roundings here and three there, of 2**-8 each.
            torch.testing.assert_close(quick.grad, due.grad, rtol=2**-6, atol=1e-4)
        assert_same_on_all_ranks(cast)


def test_communication_hooks_and_reduced_precision(engine: str) -> None:
    run(_hooks, engine)


def _graph(rank: int, engine: str) -> None:
    stream = torch.cuda.Stream()
    x = batch("mlp", rank, 0)[0]
    with torch.cuda.stream(stream):
        eager, replayed = (
            fastddp.DistributedDataParallel(
                CASES["mlp"].build().to(here()), engine=engine, bucket_cap_mb=0.0001
            )
            for _ in range(2)
        )
    torch.cuda.synchronize()
    optimizers = {m: torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, replayed)}

    def step(model: nn.Module) -> None:
        optimizers[model].zero_grad()
        loss_of(model(x)).backward()
        optimizers[model].step()

    graph = None
    for number in range(6):
        x.copy_(batch("mlp", rank, number)[0])
        stream.wait_stream(torch.cuda.current_stream())
        if number == 2:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step(replayed)
        with torch.cuda.stream(stream):
            step(eager)
            if graph is None:
                step(replayed)
            else:
                graph.replay()
        torch.cuda.synchronize()
        for mine, due in zip(replayed.parameters(), eager.parameters(), strict=True):
            assert torch.equal(mine, due), f"step {number}"
    assert_same_on_all_ranks(replayed)


def test_a_graph_of_a_whole_step(engine: str) -> None:
    run(_graph, engine)


def _overlap(rank: int, engine: str) -> tuple[int, int]:
    """Return how many collectives began before the last of backward's own kernels, and all."""
    layers = [nn.Linear(2048, 2048) for _ in range(12)]
    model = fastddp.DistributedDataParallel(
        nn.Sequential(*layers).to(here()), engine=engine, bucket_cap_mb=32
    )
    x = torch.randn(2048, 2048, device=here())
    for _ in range(3):  # the order is learned, and NCCL has its connections
        model.zero_grad()
        model(x).square().mean().backward()
    model.zero_grad()
    loss = model(x).square().mean()
    dist.barrier()
    events = device_events(loss.backward)
    collectives = [begin for name, begin, _ in events if "nccl" in name.lower()]
    own = [begin for name, begin, _ in events if is_kernel(name) and "gemm" in name.lower()]
    if not own:  # kernels have other names with every new library
        own = [b for name, b, _ in events if is_kernel(name) and "nccl" not in name.lower()]
    return sum(begin < max(own) for begin in collectives), len(collectives)


@pytest.mark.filterwarnings("default::UserWarning")
def test_collectives_begin_while_backward_goes_on(engine: str) -> None:
    for early, all_of_them in run(_overlap, engine):
        assert all_of_them >= 5
        assert early >= 2, f"{early} of {all_of_them} collectives began in time"


def _whole_program(rank: int) -> list[float]:
    model = fastddp.wrap(CASES["mlp"].build())
    assert next(model.parameters()).device == torch.device("cuda", rank)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model(*CASES["mlp"].inputs(rank, step)))  # inputs are moved
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, *(param.sum().item() for param in model.parameters())]


def test_wrap_gives_each_rank_its_gpu() -> None:
    first, second = run(_whole_program)
    assert first[:STEPS] != second[:STEPS]
    assert first[STEPS:] == second[STEPS:]
