"""What a rank does: build every variant, prove it right, then time it.

Words: a *replica* is one variant's copy of the model. A *round* times one step of every replica, in
an order that changes from round to round.
"""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.machine import pss_bytes
from benchmarks.models import MODELS, Batch, Model, gradient_bytes
from benchmarks.variants import TORCH, Groups, Variant, keep_memory

SEED = 17
LEARNING_RATE = 1e-3


class WrongResultError(Exception):
    """A variant's values differ from the reference's, so its time means nothing."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure; the same object goes to every rank."""

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
    """One rank's part of a measurement; times by variant, one per round."""

    gradient_bytes: int
    dtype: str
    verified: str
    step_ms: dict[str, list[float]]
    wait_us: dict[str, float] = field(default_factory=dict)


class Replica:
    """One variant's copy of the model, with its optimizer."""

    def __init__(self, variant: Variant, module: nn.Module, model: Model, groups: Groups) -> None:
        self.variant = variant
        self.model = model
        self.bare = module
        self.wrapped = variant.wrap(module, groups)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def backward(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.loss(self.wrapped(batch.inputs), batch.targets).backward()

    def prepare(self) -> None:
        """To be called before each backward or step, outside of what is timed."""
        keep_memory(self.variant.keeps_memory)

    def step(self, batch: Batch) -> None:
        self.backward(batch)
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.bare.named_parameters() if p.grad is not None}

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers."""
        return dict(self.bare.state_dict())


def measure(plan: Plan) -> RankResult:
    """Verify and time all variants of a plan; every rank calls it with the same plan."""
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
    """The peak of this rank's memory (PSS, bytes) while it trains the plan's only variant."""
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


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: every second round starts one further, the others run backwards.

    So every variant takes every place, and not always after the same neighbour.
    """
    start = (number // 2) % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def timed_step_ms(replica: Replica, batch: Batch) -> float:
    replica.prepare()
    dist.barrier()
    start = time.perf_counter()
    replica.step(batch)
    return 1e3 * (time.perf_counter() - start)


def _wait_us(replica: Replica) -> float | None:
    """Microseconds a variant has waited for communication so far, where it counts them."""
    stats = getattr(replica.wrapped, "stats", None)
    return float(stats().wait_us_total) if callable(stats) else None


# Verification -------------------------------------------------------------------------------------


def one_order_of_summation() -> bool:
    """With two ranks a + b is b + a, so right results are equal bit for bit."""
    return dist.get_world_size() <= 2


def check_steps(
    replicas: Mapping[str, Replica], original: nn.Module, model: Model, steps: int
) -> str | None:
    """Compare each synchronising replica's gradients and buffers with torch's, batch by batch.

    The weights stay as they were built, so that each step is judged on its own. All steps are run
    whatever is found: a rank that stopped early would leave the others waiting in a collective.
    Returns the first problem.
    """
    problem = None
    for step in range(steps):
        batch = model.batch(dist.get_rank(), step)
        for replica in replicas.values():
            replica.prepare()
            replica.backward(batch)
        bound = None if one_order_of_summation() else rounding_bound(original, model, batch)
        reference = replicas[TORCH]
        for replica in replicas.values():
            if problem is None and replica.variant.synchronises:
                found = first_difference(reference.gradients(), replica.gradients(), bound)
                found = found or first_difference(reference.state(), replica.state())
                problem = found and f"{replica.variant.name}, backward {step + 1}: {found}"
    return problem


def check_training(replicas: Mapping[str, Replica]) -> str | None:
    """After the timed steps every synchronising replica has been trained to the same bits."""
    reference = replicas[TORCH].state()
    for replica in replicas.values():
        if replica.variant.synchronises:
            found = first_difference(reference, replica.state())
            if found is not None:
                return f"{replica.variant.name}, after the timed steps: {found}"
    return None


def first_difference(
    reference: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
    bound: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Describe the first tensor that differs in any bit, or by more than `bound`, if one does."""
    for name in dict.fromkeys([*reference, *candidate]):
        if name not in candidate or name not in reference:
            return f"only {'torch' if name in reference else 'the variant'} has {name}"
        expected, got = reference[name], candidate[name]
        if bound is None:
            equal = torch.equal(_bits(expected), _bits(got))
        else:
            equal = bool(((expected - got).abs() <= bound[name]).all())
        if not equal:
            worst = int((expected - got).abs().argmax())
            return (
                f"{name}[{worst}] of {expected.numel()} is {got.flatten()[worst]:.9g}"
                f" where torch has {expected.flatten()[worst]:.9g}"
            )
    return None


def rounding_bound(original: nn.Module, model: Model, batch: Batch) -> dict[str, Tensor]:
    """How far two right averages over the ranks may lie apart, for each element of each gradient.

    W gradients g are summed in W - 1 rounded additions and scaled in one more rounded operation, in
    whatever order. Each rounding errs by at most u * sum|g| (before the scaling), u being half the
    machine epsilon. So an average errs by at most W * u * sum|g| / W, and two of them lie within
    2u * sum|g| = epsilon * sum|g|. One percent more is allowed for terms of order u squared.
    """
    original.zero_grad(set_to_none=True)
    model.loss(original(batch.inputs), batch.targets).backward()
    bound: dict[str, Tensor] = {}
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            total = parameter.grad.abs()
            dist.all_reduce(total)
            bound[name] = total * (1.01 * torch.finfo(total.dtype).eps)
    return bound


def refuse_on_any_rank(problem: str | None) -> None:
    """Raise on every rank what any rank found."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise WrongResultError(f"rank {rank}: {found}. No time is reported for a wrong result.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)


# Timing and memory --------------------------------------------------------------------------------


@contextmanager
def no_collector_pauses() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass
class Peak:
    value: int = 0


@contextmanager
def sampled_peak(every_s: float = 0.005) -> Iterator[Peak]:
    """Watch this process's PSS from a thread; the kernel keeps a peak of RSS only."""
    peak = Peak()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            peak.value = max(peak.value, pss_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak.value = max(peak.value, pss_bytes())
        stop.set()
        watcher.join()
