"""The work of a rank: build every variant, verify its results, then time it.

Words: a *replica* is one variant's copy of the model. A *round* times one step of every replica, in
an order that changes from round to round.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch.distributed as dist

from benchmarks.common.trials import no_collector_pauses, refuse_on_any_rank, turn_order
from benchmarks.step.memory import sampled_peak
from benchmarks.step.models import MODELS, Batch, gradient_bytes
from benchmarks.step.replica import Replica
from benchmarks.step.variants import TORCH, Groups, Variant
from benchmarks.step.verify import check_steps, check_training, one_order_of_summation

SEED = 17


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The models and variants to measure; every rank gets the same plan."""

    model: str
    variants: tuple[Variant, ...]
    rounds: int = 20
    warmup: int = 5

    def __post_init__(self) -> None:
        if self.warmup < 5:
            raise ValueError(
                f"warmup is {self.warmup}; buckets are rebuilt after step 1, so use 5 steps or more"
            )
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; at least one is needed")


@dataclass(kw_only=True)
class RankResult:
    """One rank's part of a measurement: for each variant one time per round."""

    gradient_bytes: int
    dtype: str
    verified: str
    step_ms: dict[str, list[float]]
    wait_us: dict[str, float] = field(default_factory=dict)


def measure(plan: Plan) -> RankResult:
    """Verifies and times all variants of a plan. Collective: every rank has the same plan."""
    if TORCH not in {variant.name for variant in plan.variants}:
        raise ValueError(
            f"{TORCH!r} is what the others are verified against: add it to the variants"
        )
    groups = make_groups()
    rank = dist.get_rank()
    model = MODELS[plan.model]
    original = model.build(SEED)
    replicas = {v.name: Replica(v, copy.deepcopy(original), model, groups) for v in plan.variants}

    refuse_on_any_rank(check_steps(replicas, original, model, plan.warmup))
    for replica in replicas.values():  # the first optimizer step is a warm-up too
        replica.prepare()
        replica.step(model.batch(rank, plan.warmup))

    waited = {name: _wait_us(replica) for name, replica in replicas.items()}
    step_ms: dict[str, list[float]] = {name: [] for name in replicas}
    with no_collector_pauses():
        for number in range(plan.rounds):
            batch = model.batch(rank, plan.warmup + 1 + number)
            for name in turn_order(list(replicas), number):
                step_ms[name].append(timed_step_ms(replicas[name], batch))
    if one_order_of_summation():
        refuse_on_any_rank(check_training(replicas))
    return RankResult(
        gradient_bytes=gradient_bytes(original),
        dtype=str(next(original.parameters()).dtype).removeprefix("torch."),
        verified="bitwise" if one_order_of_summation() else "within rounding",
        step_ms=step_ms,
        wait_us={
            name: (after - before) / plan.rounds
            for name, before in waited.items()
            if before is not None and (after := _wait_us(replicas[name])) is not None
        },
    )


def measure_memory(plan: Plan) -> int:
    """Returns the peak of this rank's PSS in bytes while it trains the plan's only variant."""
    (variant,) = plan.variants
    model = MODELS[plan.model]
    replica = Replica(variant, model.build(SEED), model, make_groups())
    replica.prepare()
    with sampled_peak() as peak:
        for number in range(plan.warmup + plan.rounds):
            replica.step(model.batch(dist.get_rank(), number))
    return peak.value


def make_groups() -> Groups:
    world = dist.group.WORLD
    assert world is not None, "run_ranks initialises the default group"
    return Groups(real=world, silent=dist.new_group(backend="fake"))


def timed_step_ms(replica: Replica, batch: Batch) -> float:
    replica.prepare()
    dist.barrier()
    start = time.perf_counter()
    replica.step(batch)
    return 1e3 * (time.perf_counter() - start)


def _wait_us(replica: Replica) -> float | None:
    """Returns the microseconds that a variant has waited for communication, if it counts them."""
    stats = getattr(replica.wrapped, "stats", None)
    return float(stats().wait_us_total) if callable(stats) else None
