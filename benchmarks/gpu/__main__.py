"""How fast is it on a GPU? `python -m benchmarks.gpu --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.machine import describe, describe_gpus
from benchmarks.common.ranks import run_ranks
from benchmarks.common.report import append_json, print_columns, print_machine, shown
from benchmarks.common.stats import (
    Estimate,
    Figure,
    Samples,
    estimate,
    median,
    quantile,
    slowest_rank,
)
from benchmarks.gpu.device import (
    COPY,
    ONE_BY_ONE,
    Pass,
    bandwidth_passes,
    device_us,
    tiny_passes,
    verify,
    wall_us,
)
from benchmarks.gpu.steps import (
    BF16_VARIANTS,
    TORCH_BF16,
    VARIANTS,
    StepPlan,
    StepResult,
    measure_steps,
)
from benchmarks.step.models import MODELS
from benchmarks.step.variants import NOSYNC, TORCH, available

PARTS = ("bandwidth", "tiny", "steps", "bf16")
SIZES_MB = (8, 64, 256)
NUM_TINY = 2000
Machine = Mapping[str, "str | int | float"]


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """One pass over a bucket or many tiny tensors. `docs/benchmarks.md` explains the fields."""

    part: str
    case: str
    size_mb: float
    tensors: int | None
    verified: str
    rounds: int
    us: float
    us_p10: float
    us_p90: float
    host_us: float | None
    gb_s: float
    copy_share: Estimate | None
    one_by_one_ratio: Estimate | None
    machine: Machine
    us_rounds: list[float]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One variant of one model at one number of GPUs."""

    part: str
    model: str
    variant: str
    verified: str
    ranks: int
    gradient_bytes: int
    rounds: int
    step_ms: float
    step_ms_p10: float
    step_ms_p90: float
    host_ms: float
    cpu_ms: float
    ratio: Estimate | None
    own_host_us: Estimate | None
    own_cpu_us: Estimate | None
    host_share: Estimate | None
    machine: Machine
    step_ms_rounds: list[float]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu needs a CUDA GPU, and torch sees none here"
            f" (torch {torch.__version__}, built for CUDA {torch.version.cuda or 'not at all'});"
            " benchmarks.step times the CPU"
        )
    console = Console(width=None if Console().is_terminal else 160)
    machine = describe() | describe_gpus()
    print_machine(console, describe())
    console.print(", ".join(f"{k} {v}" for k, v in describe_gpus().items()), highlight=False)
    device = torch.device("cuda", 0)

    def keep(records: Sequence[PassRecord | StepRecord]) -> None:
        if options.json:
            append_json(options.json, records)

    if "bandwidth" in options.parts:
        for size_mb in options.sizes:
            records = bandwidth(device, size_mb, options.rounds, machine)
            print_passes(console, records)
            keep(records)
    if "tiny" in options.parts:
        records = tiny(device, NUM_TINY, options.rounds, machine)
        print_passes(console, records)
        keep(records)
    torch.cuda.empty_cache()  # ranks share the device with this process
    counts = options.gpus or sorted({1, torch.cuda.device_count()})
    for model in options.models:
        for ranks in counts:
            for part, variants in step_parts(options.parts, ranks).items():
                plan = StepPlan(model=model, variants=tuple(variants), rounds=options.rounds)
                results = run_ranks(
                    measure_steps, ranks, plan, limit_s=options.limit, backend="nccl"
                )
                steps = step_records(part, plan, results, machine)
                print_steps(console, steps)
                keep(steps)


def step_parts(parts: Sequence[str], ranks: int) -> dict[str, list[str]]:
    """Returns the variants of each part at a number of ranks. A rank alone has nothing to cast."""
    found = {}
    if "steps" in parts:
        found["steps"] = [name for name in VARIANTS if name in available()]
    if "bf16" in parts and ranks > 1:
        found["bf16"] = [NOSYNC, TORCH, *BF16_VARIANTS]
    return found


# Passes -------------------------------------------------------------------------------------------


def bandwidth(
    device: torch.device, size_mb: int, rounds: int, machine: Machine
) -> list[PassRecord]:
    """Times the passes over a bucket of `size_mb` million bytes, in microseconds of the device."""
    passes = bandwidth_passes(device, size_mb * 1_000_000 // 4)
    verify(passes)
    samples = device_us(device, passes, rounds, calls=20)
    verify(passes)
    return pass_records("bandwidth", passes, samples, machine, size_mb=size_mb)


def tiny(device: torch.device, count: int, rounds: int, machine: Machine) -> list[PassRecord]:
    """Times passes over many tiny tensors: until the result is complete, and until they return."""
    passes = tiny_passes(device, count)
    verify(passes)
    done, returned = wall_us(device, passes, rounds)
    verify(passes)
    size_mb = next(iter(passes.values())).num_bytes / 2e6
    return pass_records(
        "tiny", passes, done, machine, size_mb=size_mb, tensors=count, returned=returned
    )


def pass_records(
    part: str,
    passes: Mapping[str, Pass],
    samples: Samples,
    machine: Machine,
    *,
    size_mb: float,
    tensors: int | None = None,
    returned: Samples | None = None,
) -> list[PassRecord]:
    def record(name: str) -> PassRecord:
        times = samples[name]
        return PassRecord(
            part=part,
            case=name,
            size_mb=size_mb,
            tensors=tensors,
            verified="bitwise",
            rounds=len(times),
            us=median(times),
            us_p10=quantile(times, 0.1),
            us_p90=quantile(times, 0.9),
            host_us=None if returned is None else median(returned[name]),
            gb_s=passes[name].num_bytes / median(times) / 1e3,
            copy_share=_copy_share(passes, samples, name),
            one_by_one_ratio=_ratio(samples, ONE_BY_ONE, name),
            machine=machine,
            us_rounds=[round(value, 3) for value in times],
        )

    return [record(name) for name in passes]


def _copy_share(passes: Mapping[str, Pass], samples: Samples, name: str) -> Estimate | None:
    """Returns a pass's bytes per second as a share of those of a copy on the same device."""
    if COPY not in passes or name == COPY:
        return None
    bytes_ratio = passes[name].num_bytes / passes[COPY].num_bytes
    return estimate(samples, lambda s: bytes_ratio * median(s[COPY]) / median(s[name]))


def _ratio(samples: Samples, over: str, under: str) -> Estimate | None:
    if over == under or over not in samples:
        return None
    return estimate(samples, lambda s: median(s[over]) / median(s[under]))


def print_passes(console: Console, records: Sequence[PassRecord]) -> None:
    first = records[0]
    what = f"{first.size_mb:g} MB" + (f" in {first.tensors} tensors" if first.tensors else "")
    cells = {
        "variant": [r.case for r in records],
        "us": [f"{r.us:.1f}" for r in records],
        "p10-p90": [f"{r.us_p10:.1f}-{r.us_p90:.1f}" for r in records],
        "host us": ["" if r.host_us is None else f"{r.host_us:.1f}" for r in records],
        "GB/s": [f"{r.gb_s:.0f}" for r in records],
        "of a copy": [shown(r.copy_share, ".0%") for r in records],
        "one by one/this": [shown(r.one_by_one_ratio, ".1f") for r in records],
    }
    print_columns(console, f"{first.part}: {what}, {first.rounds} rounds", cells)


# Steps --------------------------------------------------------------------------------------------


def step_records(
    part: str, plan: StepPlan, results: Sequence[StepResult], machine: Machine
) -> list[StepRecord]:
    """Makes one record for each variant, from the slowest rank of each round."""

    def slowest(samples: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
        return {name: slowest_rank([one[name] for one in samples]) for name in plan.variants}

    step = slowest([r.step_ms for r in results])
    host = slowest([r.host_ms for r in results])
    cpu = slowest([r.cpu_ms for r in results])
    baseline = TORCH_BF16 if part == "bf16" else TORCH

    def record(name: str) -> StepRecord:
        wrapped = name != NOSYNC
        share = wrapped and name != TORCH and part == "steps"
        return StepRecord(
            part=part,
            model=plan.model,
            variant=name,
            verified="within rounding" if wrapped else "no",
            ranks=len(results),
            gradient_bytes=results[0].gradient_bytes,
            rounds=plan.rounds,
            step_ms=median(step[name]),
            step_ms_p10=quantile(step[name], 0.1),
            step_ms_p90=quantile(step[name], 0.9),
            host_ms=median(host[name]),
            cpu_ms=median(cpu[name]),
            ratio=_ratio(step, baseline, name),
            own_host_us=estimate(host, _own(name)) if wrapped else None,
            own_cpu_us=estimate(cpu, _own(name)) if wrapped else None,
            host_share=estimate(cpu, _host_share(name)) if share else None,
            machine=machine,
            step_ms_rounds=[round(value, 4) for value in step[name]],
        )

    return [record(name) for name in plan.variants]


def _own(name: str) -> Figure:
    """Returns the figure of a wrapper's own time: microseconds beyond a step without a wrapper."""
    return lambda s: 1e3 * (median(s[name]) - median(s[NOSYNC]))


def _host_share(name: str) -> Figure:
    """Returns the figure of a wrapper's own time as a share of that of torch's class."""

    def figure(s: Samples) -> float | None:
        torchs = median(s[TORCH]) - median(s[NOSYNC])
        return (median(s[name]) - median(s[NOSYNC])) / torchs if torchs > 0 else None

    return figure


def print_steps(console: Console, records: Sequence[StepRecord]) -> None:
    first = records[0]
    against = TORCH_BF16 if first.part == "bf16" else TORCH
    cells = {
        "variant": [r.variant for r in records],
        "verified": [r.verified for r in records],
        "step ms": [f"{r.step_ms:.3f}" for r in records],
        "p10-p90": [f"{r.step_ms_p10:.3f}-{r.step_ms_p90:.3f}" for r in records],
        f"{against}/this": [shown(r.ratio, ".2f") for r in records],
        "host ms": [f"{r.host_ms:.3f}" for r in records],
        "CPU ms": [f"{r.cpu_ms:.3f}" for r in records],
        "own host us": [shown(r.own_host_us, ".0f") for r in records],
        "own CPU us": [shown(r.own_cpu_us, ".0f") for r in records],
        "own CPU/torch": [shown(r.host_share, ".2f") for r in records],
    }
    title = (
        f"{first.model}: {first.gradient_bytes / 1e6:.1f} MB of gradients, {first.ranks} GPU(s),"
        f" {first.rounds} rounds"
    )
    print_columns(console, title, cells)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=list(SIZES_MB),
        metavar="MB",
        help="sizes of a bucket of float32, in million bytes",
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL"
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=int,
        help="numbers of ranks, each with a GPU; by default 1 and the number of GPUs",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--limit", type=float, default=1800, help="seconds after which a run is given up"
    )
    parser.add_argument("--json", type=Path, help="add one JSON object for each line to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
