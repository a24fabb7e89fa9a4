"""Two wrapped models in one job, whose used parameters differ by rank and step.

The oracle is this rank's gradients by plain autograd on copies, averaged in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import fastddp
from tests.ranks import run_ranks

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}
WIDTH = 16
STEPS = 16  # beyond the rounds in which shared memory tries when to launch


class Layers(nn.Module):
    """Layers that a step may skip."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor, used: Sequence[bool]) -> Tensor:
        for layer, is_used in zip(self.layers, used, strict=True):
            x = x + torch.tanh(layer(x)) if is_used else x
        return x


class Critic(Layers):
    pass


class Actor(Layers):
    pass


def _models(count: int) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return [(Actor, Critic)[nth % 2]() for nth in range(count)]


def _wrap(model: nn.Module, engine: str) -> fastddp.DistributedDataParallel:
    return fastddp.DistributedDataParallel(model, engine=engine, bucket_cap_mb=1e-4)


def _local_gradients(models: Sequence[nn.Module]) -> list[Tensor]:
    params = [p for model in models for p in model.parameters()]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def _check(ours: Sequence[nn.Module], plain: Sequence[nn.Module], what: object) -> None:
    """Compares with the mean of the ranks' gradients, and each rank's with the others'."""
    want = torch.cat([grad.reshape(-1) for grad in _local_gradients(plain)]).double()
    dist.all_reduce(want)
    want /= dist.get_world_size()
    got = torch.cat([grad.reshape(-1) for grad in _local_gradients(ours)])
    torch.testing.assert_close(
        got.double(), want, atol=1e-6, rtol=1e-5, msg=lambda m: f"{what}: {m}"
    )
    everybody = [torch.empty_like(got) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, got)
    assert all(torch.equal(got, other) for other in everybody), what


def _used(rank: int, step: int, which: int) -> list[bool]:
    generator = torch.Generator().manual_seed(1_000 * step + 10 * rank + which)
    used = (torch.rand(4, generator=generator) < 0.6).tolist()
    used[step % 4] = True  # or there would be no graph, which is another matter
    return used


def _train(rank: int, world_size: int, engine: str, way: str, hook: bool) -> None:
    models = _models(3)
    plain = copy.deepcopy(models)
    ours = [_wrap(model, engine) for model in models]
    if hook:
        for model in ours:
            model.register_comm_hook(None, default_hooks.allreduce_hook)
    for step in range(STEPS):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
        used = [_used(rank, step, which) for which in range(3)]
        for models_of_step in (ours, plain):
            for model in models_of_step:
                model.zero_grad()
            first, second, third = models_of_step
            if way == "through":
                third(second(first(x, used[0]), used[1]), used[2]).square().mean().backward()
            elif way == "sum":
                losses = [
                    m(x, u).square().mean() for m, u in zip(models_of_step, used, strict=True)
                ]
                sum(losses).backward()
            else:  # several backwards, as of a GAN: the critic's, then the actor's through it
                fake = first(x, used[0])
                second(fake.detach(), used[1]).mean().backward()
                second(fake, used[2]).square().mean().backward()
                third(x, used[2]).mean().backward()
        _check([m.module for m in ours], plain, (way, step))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", ["through", "sum", "several"])
def test_each_gets_the_mean_of_its_own(engine: str, transport: str, way: str) -> None:
    run_ranks(_train, 2, engine, way, False, env=TRANSPORTS[transport])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_gets_its_own_with_hooks(engine: str, transport: str) -> None:
    run_ranks(_train, 2, engine, "through", True, env=TRANSPORTS[transport])


def test_each_gets_its_own_on_three_ranks(engine: str) -> None:
    run_ranks(_train, 3, engine, "through", False)


def _swapped(rank: int, world_size: int, engine: str, rounds: int) -> str:
    first, second = (_wrap(model, engine) for model in _models(4)[1::2])  # twin critics
    x = torch.ones(2, WIDTH)
    for step in range(rounds):
        order = (first, second) if rank == 0 or step < rounds - 1 else (second, first)
        outputs = {id(model): model(x, [True] * 4).mean() for model in order}
        loss = outputs[id(first)] + 2 * outputs[id(second)]
        if step < rounds - 1:
            loss.backward()
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    return str(error.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rounds", [1, 4])
def test_twins_that_change_places_on_one_rank_are_told_apart(
    engine: str, transport: str, rounds: int
) -> None:
    texts = run_ranks(_swapped, 2, engine, rounds, env=TRANSPORTS[transport])
    for text in texts:
        assert "model 'Critic' (number 1 of those wrapped)" in text, text
        assert "model 'Critic' (number 2 of those wrapped)" in text, text
        assert "same order on all ranks" in text, text


def _buffers(rank: int, world_size: int, engine: str) -> str:
    """Buffers of equal size: one rank runs the forwards in the other order."""
    models = [nn.BatchNorm1d(WIDTH) for _ in range(2)]
    ours = [_wrap(model, engine) for model in models]
    x = torch.ones(2, WIDTH)
    first = ours[0 if rank == 0 else 1]
    with pytest.raises(RuntimeError) as error:
        first(x)
    return str(error.value)


def test_buffers_of_twins_are_told_apart(engine: str) -> None:
    texts = run_ranks(_buffers, 2, engine)
    for text in texts:
        assert "(number 1 of those wrapped)" in text, text
        assert "(number 2 of those wrapped)" in text, text
