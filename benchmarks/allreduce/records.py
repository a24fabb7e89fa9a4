"""Records of timed all-reduces, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks.allreduce.measure import (
    DTYPES,
    FLOOR,
    MPI,
    VARIANTS,
    CaseResult,
    Plan,
)
from benchmarks.common.report import print_columns, shown
from benchmarks.common.stats import Estimate, Samples, estimate, median, quantile, slowest_rank


@dataclass(frozen=True, kw_only=True)
class AllreduceRecord:
    """One line of results: one variant, dtype, size. `docs/benchmarks.md` derives every field."""

    size: str
    elements: int
    variant: str
    dtype: str
    verified: str
    ranks: int
    threads: int
    rounds: int
    calls: int
    us: float
    us_p10: float
    us_p90: float
    bus_gb_s: float | None
    gloo_ratio: Estimate | None
    mpi_ratio: Estimate | None
    floor_ratio: Estimate | None
    float32_ratio: Estimate | None
    machine: Mapping[str, str | int | float]
    us_rounds: list[float]


def make_records(
    size: str,
    plan: Plan,
    results: Sequence[Sequence[CaseResult]],
    *,
    threads: int,
    machine: Mapping[str, str | int | float],
) -> list[AllreduceRecord]:
    """Makes one record for each case, in the order in which the ranks list them."""
    cases = list(zip(*results, strict=True))
    samples = {
        (ours[0].variant, ours[0].dtype): slowest_rank([case.us for case in ours]) for ours in cases
    }

    def record(case: CaseResult) -> AllreduceRecord:
        times = samples[case.variant, case.dtype]
        ratios = {
            name: ratio(samples, *pair)
            for name, pair in compared(case.variant, case.dtype).items()
            if set(pair) <= samples.keys()
        }
        itemsize = DTYPES[case.dtype].itemsize
        moved = plan.elements * itemsize * 2 * (len(results) - 1) / len(results)
        return AllreduceRecord(
            size=size,
            elements=plan.elements,
            variant=case.variant,
            dtype=case.dtype,
            verified=case.verified,
            ranks=len(results),
            threads=threads,
            rounds=plan.rounds,
            calls=case.calls,
            us=median(times),
            us_p10=quantile(times, 0.1),
            us_p90=quantile(times, 0.9),
            bus_gb_s=None if case.variant == FLOOR else moved / median(times) / 1e3,
            gloo_ratio=ratios.get("gloo"),
            mpi_ratio=ratios.get("mpi"),
            floor_ratio=ratios.get("floor"),
            float32_ratio=ratios.get("float32"),
            machine=machine,
            us_rounds=[round(value, 4) for value in times],
        )

    return [record(ours[0]) for ours in cases]


Case = tuple[str, str]


def compared(variant: str, dtype: str) -> dict[str, tuple[Case, Case]]:
    """Returns, by name, the pairs of cases to divide the times of: the first by the second."""
    case = (variant, dtype)
    found: dict[str, tuple[Case, Case]] = {}
    if (gloo := VARIANTS[variant].gloo) is not None:
        found["gloo"] = (gloo, dtype), case
        found["floor"] = case, (FLOOR, dtype)
        if variant != MPI:
            found["mpi"] = (MPI, dtype), case
    if dtype != "float32":
        found["float32"] = case, (variant, "float32")
    return found


def ratio(samples: Mapping[Case, Sequence[float]], over: Case, under: Case) -> Estimate:
    pair: Samples = {"over": samples[over], "under": samples[under]}
    return estimate(pair, lambda s: median(s["over"]) / median(s["under"]))


def print_records(console: Console, records: Sequence[AllreduceRecord]) -> None:
    """Prints the cases of one size."""
    first = records[0]
    title = (
        f"all-reduce of {first.elements} elements, {first.size} of float32, "
        f"{first.ranks} ranks x {first.threads} thread, {first.rounds} rounds"
    )
    cells = {
        "variant": [r.variant for r in records],
        "dtype": [r.dtype for r in records],
        "verified": [r.verified for r in records],
        "us": [_digits(r.us) for r in records],
        "p10-p90": [f"{_digits(r.us_p10)}-{_digits(r.us_p90)}" for r in records],
        "bus GB/s": ["" if r.bus_gb_s is None else _digits(r.bus_gb_s) for r in records],
        "gloo/this": [shown(r.gloo_ratio, ".2f") for r in records],
        "mpi/this": [shown(r.mpi_ratio, ".2f") for r in records],
        "this/floor": [shown(r.floor_ratio, ".2f") for r in records],
        "this/float32": [shown(r.float32_ratio, ".2f") for r in records],
    }
    print_columns(console, title, cells)


def _digits(value: float) -> str:
    """Returns a value with at least three digits, because values span six orders of magnitude."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
