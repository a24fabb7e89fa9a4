"""Random jobs: several models on one group that change on the way, with a thread that asks.

Each step of a job runs some models, each rank with layers of its own choice, after perhaps a change
of one of them. The oracle is a plain copy of each model that is changed alike, whose gradients are
averaged over the ranks in float64. FASTDDP_PROPERTY_EXAMPLES as in ``test_properties.py``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastddp
from tests.conftest import flattening, require_native
from tests.ranks import run_ranks
from tests.slow import slow_but_for

EXAMPLES = int(os.environ.get("FASTDDP_PROPERTY_EXAMPLES", "0"))
WIDTH = 6
ENGINES = ("native", "python", "flattening", "one of each")
WAYS = ("through", "sum", "several")


class Layers(nn.Module):
    """Layers of which each rank skips others in each forward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, seed: int) -> Tensor:
        chosen = torch.Generator().manual_seed(seed)
        skipped = torch.rand(len(self.layers), generator=chosen) < 0.4
        skipped[0] = False  # whose bias is never frozen: there always is a graph
        for layer, skips in zip(self.layers, skipped.tolist(), strict=True):
            x = x if skips else x + torch.tanh(layer(x.to(layer.weight.dtype)))
        return x


def _replace(net: Layers) -> None:
    net.layers[0] = nn.Linear(WIDTH, WIDTH)


def _append(net: Layers) -> None:
    net.layers.append(nn.Linear(WIDTH, WIDTH, bias=False))


def _toggle(net: Layers) -> None:
    net.layers[1].requires_grad_(not net.layers[1].weight.requires_grad)


def _new_data(net: Layers) -> None:
    net.layers[1].weight.data = torch.randn(WIDTH, WIDTH, dtype=net.layers[1].weight.dtype).t()


def _double(net: Layers) -> None:
    net.layers[2].double()


def _tie(net: Layers) -> None:
    net.layers[0].weight = net.layers[1].weight


CHANGES: dict[str, Callable[[Layers], None]] = {
    fn.__name__: fn for fn in (_replace, _append, _toggle, _new_data, _double, _tie)
}


@dataclass(frozen=True)
class Step:
    way: str
    models: tuple[int, ...]
    change: str | None
    seed: int
    to_none: bool


@dataclass(frozen=True)
class Job:
    num_models: int
    twins: bool
    asks: bool
    steps: tuple[Step, ...]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    num_models = draw(st.integers(1, 3))
    step = st.builds(
        Step,
        way=st.sampled_from(WAYS),
        models=st.permutations(range(num_models)).map(tuple),
        change=st.sampled_from([None, None, None, *CHANGES]),
        seed=st.integers(0, 99),
        to_none=st.booleans(),
    )
    steps = [draw(step) for _ in range(draw(st.integers(1, 14)))]
    return Job(num_models, draw(st.booleans()), draw(st.booleans()), tuple(steps))


def _wrap(net: nn.Module, engine: str, rank: int) -> fastddp.DistributedDataParallel:
    if engine == "flattening":
        with flattening():
            return fastddp.DistributedDataParallel(net, engine="native", bucket_cap_mb=1e-4)
    if engine == "one of each":
        engine = ("native", "python")[rank % 2]
    return fastddp.DistributedDataParallel(net, engine=engine, bucket_cap_mb=1e-4)


def _backward(models: Sequence[nn.Module], step: Step, x: Tensor, seed: int) -> None:
    chosen = [models[index] for index in step.models]
    if step.way == "through":
        for nth, model in enumerate(chosen):
            x = model(x, seed + nth)
        x.square().mean().backward()
    elif step.way == "sum":
        outputs = [model(x, seed + nth) for nth, model in enumerate(chosen)]
        sum(output.square().mean() for output in outputs).backward()
    else:
        for nth, model in enumerate(chosen):
            model(x, seed + nth).square().mean().backward()


def _check(ours: nn.Module, plain: nn.Module, what: object) -> None:
    wanted = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        if not p.requires_grad:
            continue
        local = wanted[name].grad
        # Row after row: gloo adds up memory as it lies, and ranks may have other strides.
        want = torch.zeros(p.shape, dtype=torch.float64)
        if local is not None:
            want.copy_(local)
        dist.all_reduce(want)
        want /= dist.get_world_size()
        got = torch.zeros_like(want) if p.grad is None else p.grad.double()
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4, msg=lambda m: f"{what}: {m}")


def _run(rank: int, world_size: int, engine: str, job: Job) -> None:
    seeds = [0 if job.twins else nth for nth in range(job.num_models)]
    plain = [Layers(seed) for seed in seeds]
    ours = [_wrap(Layers(seed), engine, rank) for seed in seeds]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            for model in ours:
                model.stats(), model.plan(), model.device

    watcher = threading.Thread(target=watch, daemon=True)
    if job.asks:
        watcher.start()
    try:
        for nth, step in enumerate(job.steps):
            for both in (ours, plain):
                for model in both:
                    model.zero_grad(set_to_none=step.to_none)
                if step.change is not None:
                    torch.manual_seed(step.seed)
                    target = both[step.models[0]]
                    CHANGES[step.change](target if both is plain else target.module)
                    for p in target.parameters():
                        if p.grad is not None and p.grad.dtype != p.dtype:
                            p.grad = None
            generator = torch.Generator().manual_seed(1000 * nth + rank)
            x = torch.randn(2, WIDTH, generator=generator)
            for both in (ours, plain):
                _backward(both, step, x, step.seed + 7 * rank)
            for which in range(job.num_models):
                _check(ours[which].module, plain[which], (which, nth, step))
    finally:
        over.set()
        if job.asks:
            watcher.join()


def _run_all(rank: int, world_size: int, jobs_: Sequence[Job], engine: str) -> None:
    for job in jobs_:
        _run(rank, world_size, engine, job)


@pytest.mark.parametrize(
    "transport", slow_but_for([{}], [{}, {"FASTDDP_SHM": "0"}]), ids=["shm", "gloo"]
)
@pytest.mark.parametrize("engine", slow_but_for(["native", "python"], ENGINES))
def test_every_model_of_a_job_gets_the_mean_of_its_own(
    engine: str, transport: dict[str, str]
) -> None:
    require_native()

    @settings(
        max_examples=EXAMPLES or 4,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if not EXAMPLES else list(Phase),
    )
    @given(st.lists(jobs(), min_size=1 if EXAMPLES else 6, max_size=6))
    def check(some: list[Job]) -> None:
        run_ranks(_run_all, 2, some, engine, env=transport)

    check()
