"""Two hosts of two ranks each, in network namespaces that a link joins."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from benchmarks.common import namespaces
from benchmarks.common.namespaces import Host
from tests.hosts.common import allocate, backend_of, error_of, given, reduced
from tests.ranks import Died, run_ranks

Hosts = tuple[Host, Host]
NUMEL = 1_000_003


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(f"no network namespaces: {reason}")
    with namespaces.two_hosts() as both:
        yield both


def _run(
    fn: Callable[..., Any],
    hosts: Hosts,
    *args: Any,
    backend: str,
    timeout_s: float = 30.0,
    **options: Any,
) -> list[Any]:
    __tracebackhide__ = True
    call = (fn, hosts, backend, timeout_s, args)
    return run_ranks(_on_its_host, 4, *call, init_group=False, **options)


def _on_its_host(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    hosts: Hosts,
    backend: str,
    timeout_s: float,
    args: tuple[Any, ...],
) -> Any:
    here = hosts[rank // 2]
    here.enter()
    # Nobody else can have the port in a namespace of our own.
    store = dist.TCPStore(
        hosts[0].address,
        29500,
        world_size,
        rank == 0,
        timedelta(seconds=30),
        wait_for_workers=False,
    )
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    dist.barrier()
    return fn(rank, world_size, here, *args)


def _sent(rank: int, world_size: int, here: Host, own: bool) -> int:
    """Return how many bytes an all-reduce of NUMEL floats sends from this host to the other."""
    tensor = allocate(NUMEL, torch.float32) if own else torch.empty(NUMEL)
    tensor.copy_(given(rank, NUMEL))
    dist.barrier()
    before = here.bytes_sent()
    dist.barrier()
    dist.all_reduce(tensor)
    dist.barrier()
    assert torch.equal(tensor, reduced([0, 1, 2, 3], NUMEL))
    return here.bytes_sent() - before


def test_only_one_copy_of_the_operand_leaves_a_host(hosts):
    size = NUMEL * 4
    # A ring of 4 ranks sends 2 * 3/4 of the operand over each of its edges, and one edge leads from
    # here to there. Two lanes of 2 ranks send 2 * 1/2 of half of it each.
    for sent in _run(_sent, hosts, False, backend="gloo"):
        assert 1.5 * size <= sent < 1.7 * size
    for own in (False, True):
        for sent in _run(_sent, hosts, own, backend="shm"):
            assert size <= sent < 1.2 * size


def _train(rank: int, world_size: int, here: Host) -> bytes:
    assert not hasattr(backend_of(), "spans_hosts")  # gloo; the wrapper finds its own way
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8))
    reference = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8))
    reference.load_state_dict(model.state_dict())
    wrapped, by_torch = fastddp.wrap(model), nn.parallel.DistributedDataParallel(reference)
    for step in range(5):
        inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        for each in (wrapped, by_torch):
            each.zero_grad()
            each(inputs).square().mean().backward()
        with torch.no_grad():
            for parameter in (*model.parameters(), *reference.parameters()):
                parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def test_training_over_the_link(hosts):
    assert len(set(_run(_train, hosts, backend="gloo"))) == 1


def _lose_the_other_host(rank: int, world_size: int, here: Host, how: str) -> tuple[str, float]:
    tensor = allocate(NUMEL, torch.float32).zero_()
    dist.all_reduce(tensor)
    dist.barrier()
    if how == "killed" and rank >= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "unplugged" and rank == 3:
        here.unplug()
    began = time.monotonic()

    def reduce_again_and_again() -> None:
        for _ in range(1000):
            dist.all_reduce(tensor)

    return error_of(reduce_again_and_again), time.monotonic() - began


@pytest.mark.parametrize(("how", "timeout_s"), [("killed", 300.0), ("unplugged", 4.0)])
def test_a_host_that_vanishes_is_an_error_on_the_other(hosts, how, timeout_s):
    dead = [2, 3] if how == "killed" else []
    results = _run(
        _lose_the_other_host, hosts, how, backend="shm", timeout_s=timeout_s, expect_dead=dead
    )
    for rank, result in enumerate(results):
        if rank in dead:
            assert result == Died(-signal.SIGKILL)
            continue
        message, took = result
        assert f"fastddp: rank {rank}: " in message
        assert "between hosts, among ranks " in message or "timed out" in message
        assert took < 25.0
