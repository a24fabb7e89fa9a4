"""Turns the ranks' samples into records, and records into a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks.common.report import print_columns, shown
from benchmarks.common.stats import (
    Estimate,
    Figure,
    Samples,
    best,
    estimate,
    median,
    quantile,
    share_removed,
    slowest_rank,
)
from benchmarks.step.measure import Plan, RankResult
from benchmarks.step.variants import NOSYNC, TORCH_NOOP, TORCH_VARIANTS, Variant


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of results: one variant of one model. `docs/benchmarks.md` derives every field."""

    model: str
    variant: str
    verified: str
    ranks: int
    threads: int
    dtype: str
    gradient_bytes: int
    rounds: int
    step_ms: float
    step_ms_p10: float
    step_ms_p90: float
    torch_best: str
    ratio: Estimate | None
    removed: Estimate | None
    own_removed: Estimate | None
    exposed_ms: Estimate | None
    wait_us: float | None
    pss_peak_bytes: int | None
    machine: Mapping[str, str | int | float]
    step_ms_rounds: list[float]


def make_records(
    plan: Plan,
    results: Sequence[RankResult],
    *,
    threads: int,
    machine: Mapping[str, str | int | float],
    pss_peak_bytes: Mapping[str, int],
) -> list[Record]:
    """Makes one record for each variant of the plan, in the plan's order."""
    samples = {
        variant.name: slowest_rank([result.step_ms[variant.name] for result in results])
        for variant in plan.variants
    }

    def record(variant: Variant) -> Record:
        times = samples[variant.name]
        derived = {
            name: estimate(samples, figure) for name, figure in figures(variant, samples).items()
        }
        return Record(
            model=plan.model,
            variant=variant.name,
            verified=results[0].verified if variant.synchronises else "no",
            ranks=len(results),
            threads=threads,
            dtype=results[0].dtype,
            gradient_bytes=results[0].gradient_bytes,
            rounds=plan.rounds,
            step_ms=median(times),
            step_ms_p10=quantile(times, 0.1),
            step_ms_p90=quantile(times, 0.9),
            torch_best=best(samples, TORCH_VARIANTS),
            ratio=derived.get("ratio"),
            removed=derived.get("removed"),
            own_removed=derived.get("own_removed"),
            exposed_ms=derived.get("exposed_ms"),
            wait_us=max(
                (r.wait_us[variant.name] for r in results if variant.name in r.wait_us),
                default=None,
            ),
            pss_peak_bytes=pss_peak_bytes.get(variant.name),
            machine=machine,
            step_ms_rounds=[round(value, 4) for value in times],
        )

    return [record(variant) for variant in plan.variants]


def figures(variant: Variant, samples: Samples) -> dict[str, Figure]:
    """Returns the figures that make sense for a variant, given the other variants in the samples.

    Each figure chooses torch's best anew from the samples that it is given, so that the intervals
    include this choice.
    """
    name, twin = variant.name, variant.twin

    def torch_best(s: Samples) -> float:
        return median(s[best(s, TORCH_VARIANTS)])

    def over(s: Samples, of: str) -> float:
        """Returns the time that a variant takes beyond training without synchronisation."""
        return median(s[of]) - median(s[NOSYNC])

    found: dict[str, Figure] = {"ratio": lambda s: torch_best(s) / median(s[name])}
    if twin is not None and twin in samples:
        found["exposed_ms"] = lambda s: median(s[name]) - median(s[twin])
    if NOSYNC not in samples or not variant.synchronises or name in TORCH_VARIANTS:
        return found
    if variant.keeps_memory:  # it saves more than torch's overhead
        return found
    found["removed"] = lambda s: share_removed(over(s, name), of=torch_best(s) - median(s[NOSYNC]))
    if twin is not None and twin in samples and TORCH_NOOP in samples:
        found["own_removed"] = lambda s: share_removed(over(s, twin), of=over(s, TORCH_NOOP))
    return found


def print_table(console: Console, records: Sequence[Record]) -> None:
    """Prints the variants of one model."""
    first = records[0]
    title = (
        f"{first.model}: {first.gradient_bytes / 1e6:.1f} MB of {first.dtype} gradients, "
        f"{first.ranks} ranks x {first.threads} thread, {first.rounds} rounds"
    )
    cells = {
        "variant": [r.variant + (" *" if r.variant == r.torch_best else "") for r in records],
        "verified": [r.verified for r in records],
        "step ms": [f"{r.step_ms:.2f}" for r in records],
        "p10-p90": [f"{r.step_ms_p10:.2f}-{r.step_ms_p90:.2f}" for r in records],
        "ratio": [shown(r.ratio, ".2f") for r in records],
        "removed": [shown(r.removed, ".0%") for r in records],
        "own removed": [shown(r.own_removed, ".0%") for r in records],
        "exposed ms": [shown(r.exposed_ms, ".1f") for r in records],
        "wait ms": ["" if r.wait_us is None else f"{r.wait_us / 1e3:.2f}" for r in records],
        "PSS MB": [
            "" if r.pss_peak_bytes is None else f"{r.pss_peak_bytes / 1e6:.0f}" for r in records
        ],
    }
    print_columns(console, title, cells)
