"""The work of a rank with a GPU: `benchmarks.step.measure` for a device that has streams."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from benchmarks.common.trials import no_collector_pauses, refuse_on_any_rank, turn_order
from benchmarks.gpu.device import synchronize
from benchmarks.step.models import MODELS, Batch, gradient_bytes
from benchmarks.step.replica import Replica
from benchmarks.step.variants import NOSYNC, TORCH, Groups, Variant, fast_ddp, leave, torch_ddp

TORCH_BF16, OURS_BF16 = "torch-bf16", "fastddp-bf16"


def torch_in_bf16(module: nn.Module, groups: Groups) -> nn.Module:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    wrapped = torch_ddp(module, groups)
    assert isinstance(wrapped, TorchDDP)
    wrapped.register_comm_hook(groups.real, bf16_compress_hook)
    return wrapped


def ours_in_bf16(module: nn.Module, groups: Groups) -> nn.Module:
    import fastddp

    return fastddp.DistributedDataParallel(
        module, process_group=groups.real, comm_dtype=torch.bfloat16
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(NOSYNC, leave, synchronises=False),
        Variant(TORCH, torch_ddp),
        Variant("torch-view", partial(torch_ddp, view=True)),
        Variant("fastddp", partial(fast_ddp, engine="native")),
        Variant("fastddp-python", partial(fast_ddp, engine="python")),
    )
}
BF16_VARIANTS = {
    variant.name: variant
    for variant in (Variant(TORCH_BF16, torch_in_bf16), Variant(OURS_BF16, ours_in_bf16))
}
ALL_VARIANTS = VARIANTS | BF16_VARIANTS


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The model and variants to measure; every rank gets the same plan."""

    model: str
    variants: tuple[str, ...]
    rounds: int
    device_type: str = "cuda"
    warmup: int = 5


@dataclass(kw_only=True)
class StepResult:
    """One rank's samples in milliseconds: for each variant one per round."""

    gradient_bytes: int
    step_ms: dict[str, list[float]] = field(default_factory=dict)
    """The time from the beginning of a step on the device to its end on the device."""
    host_ms: dict[str, list[float]] = field(default_factory=dict)
    """The time until the calls of a step have returned."""
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    """The CPU time of all threads."""


def measure_steps(plan: StepPlan) -> StepResult:
    """Verifies and times all variants of a plan. Collective: every rank has the same plan."""
    rank = dist.get_rank()
    device = torch.device(plan.device_type, rank if plan.device_type == "cuda" else None)
    world = dist.group.WORLD
    assert world is not None
    model = MODELS[plan.model]
    original = model.build(0).to(device)
    replicas = {
        name: Replica(ALL_VARIANTS[name], copy.deepcopy(original), model, Groups(world, world))
        for name in plan.variants
    }

    def batch(step: int) -> Batch:
        inputs, targets = model.batch(rank, step)
        return Batch(inputs.to(device), targets.to(device))

    problem = None
    for step in range(plan.warmup):
        for replica in replicas.values():
            replica.backward(batch(step))
        problem = problem or _first_problem(replicas)
    refuse_on_any_rank(problem)
    result = StepResult(gradient_bytes=gradient_bytes(original))
    for samples in (result.step_ms, result.host_ms, result.cpu_ms):
        samples.update({name: [] for name in replicas})
    with no_collector_pauses():
        for number in range(-1, plan.rounds):
            data = batch(plan.warmup + 1 + number)
            for name in turn_order(list(replicas), max(number, 0)):
                times = _timed_step(device, replicas[name], data)
                if number < 0:  # the first step of the optimizer is a warm-up too
                    continue
                for samples, value in zip(
                    (result.step_ms, result.host_ms, result.cpu_ms), times, strict=True
                ):
                    samples[name].append(value)
    return result


def _timed_step(device: torch.device, replica: Replica, batch: Batch) -> tuple[float, float, float]:
    synchronize(device)
    dist.barrier()
    synchronize(device)  # NCCL's barrier is an operation of the device
    events = []
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
    cpu, start = time.process_time(), time.perf_counter()
    replica.step(batch)
    host_ms, cpu_ms = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu)
    if not events:
        return host_ms, host_ms, cpu_ms
    events[1].record()
    synchronize(device)
    return events[0].elapsed_time(events[1]), host_ms, cpu_ms


def _first_problem(replicas: dict[str, Replica]) -> str | None:
    """Describes the first gradient that differs from torch's by more than rounding, if one does."""
    reference = replicas[TORCH].gradients()
    for name, replica in replicas.items():
        if not replica.variant.synchronises or name == TORCH:
            continue
        allowed = 2**-7 if name in BF16_VARIANTS else 1e-4
        gradients = replica.gradients()
        if gradients.keys() != reference.keys():
            return f"{name}: gradients of other parameters than torch's"
        for parameter, due in reference.items():
            off = _distance(gradients[parameter], due)
            if not off <= allowed:
                return f"{name}: {parameter} is off by {off:.2g} of its norm"
    return None


def _distance(got: Tensor, due: Tensor) -> float:
    """Returns the difference as a share of the norm of `due`; 0 if it is too small for float32."""
    difference, norm = (got - due).norm().item(), due.norm().item()
    return 0.0 if difference <= 1e-12 else difference / max(norm, 1e-12)
