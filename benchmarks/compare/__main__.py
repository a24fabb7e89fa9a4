"""Is this tree slower than another one? `python -m benchmarks.compare --help`.

Two versions of one extension cannot be loaded into one process, so the two trees take turns: each
repeat runs the benchmark once in either, and the next repeat in the other order. A run's figure is
its ratio to torch (or gloo) in the same run, so a machine that is slower for a minute slows down
both sides of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.machine import describe
from benchmarks.common.report import append_json, print_columns, print_machine
from benchmarks.common.stats import Estimate, estimate, median

HERE = Path(__file__).resolve().parents[2]
# By benchmark, the fields that tell its cases apart, and the ratio that compares one with torch.
CASES = {
    "step": (("model", "variant"), "ratio"),
    "allreduce": (("size", "variant", "dtype"), "gloo_ratio"),
}

Ratios = Mapping[str, float]
"""By case, how many times as fast as torch one run found it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case of a benchmark in two trees. Ratios are torch's time to ours, one for each run."""

    benchmark: str
    case: str
    before: list[float]
    after: list[float]
    change: Estimate
    """After over before, from medians: above 1, this tree is faster than the other."""
    machine: Mapping[str, str | int | float]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if Console().is_terminal else 160)
    machine = describe()
    print_machine(console, machine)
    trees = {"before": options.before.resolve(), "after": HERE}
    runs: dict[str, list[Ratios]] = {"before": [], "after": []}
    for repeat in range(options.repeats):
        for side in ("before", "after") if repeat % 2 == 0 else ("after", "before"):
            runs[side].append(run(trees[side], options.benchmark, options.arguments))
            console.print(f"repeat {repeat + 1} of {options.repeats}: {side}", highlight=False)
    comparisons = compare(options.benchmark, runs, machine)
    print_table(console, comparisons)
    if options.json:
        append_json(options.json, comparisons)


def run(tree: Path, benchmark: str, arguments: Sequence[str]) -> Ratios:
    """Runs a benchmark of a tree in that tree, and returns the ratios that it recorded."""
    with tempfile.TemporaryDirectory(prefix="fastddp-compare-") as folder:
        records = Path(folder) / "records.jsonl"
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments, "--json", str(records)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return ratios(benchmark, [json.loads(line) for line in records.read_text().splitlines()])


def ratios(benchmark: str, records: Sequence[Mapping[str, Any]]) -> Ratios:
    """The ratios of the cases that are fastddp's; torch's own say nothing about a tree."""
    fields, ratio = CASES[benchmark]
    return {
        " ".join(record[field] for field in fields): record[ratio]["value"]
        for record in records
        if record[ratio] is not None and record["variant"].startswith(("fastddp", "shm"))
    }


def compare(
    benchmark: str, runs: Mapping[str, Sequence[Ratios]], machine: Mapping[str, str | int | float]
) -> list[Comparison]:
    """One comparison for each case that all runs of both trees have."""
    common = [
        case
        for case in runs["after"][0]
        if all(case in found for side in runs.values() for found in side)
    ]
    if not common:
        raise ValueError("the two trees have no case of fastddp's in common")

    def comparison(case: str) -> Comparison:
        samples = {side: [found[case] for found in all_found] for side, all_found in runs.items()}
        return Comparison(
            benchmark=benchmark,
            case=case,
            before=samples["before"],
            after=samples["after"],
            change=estimate(samples, lambda s: median(s["after"]) / median(s["before"])),
            machine=machine,
        )

    return [comparison(case) for case in common]


def print_table(console: Console, comparisons: Sequence[Comparison]) -> None:
    def shown(estimate: Estimate) -> str:
        return f"{estimate.value:.3f} ({estimate.low:.3f}..{estimate.high:.3f})"

    cells = {
        "case": [c.case for c in comparisons],
        "before": [f"{median(c.before):.3f}" for c in comparisons],
        "after": [f"{median(c.after):.3f}" for c in comparisons],
        "after/before": [shown(c.change) for c in comparisons],
    }
    print_columns(console, "times as fast as torch, medians of the runs", cells)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument(
        "--before", type=Path, required=True, help="another checkout, with its extension built"
    )
    parser.add_argument("--repeats", type=int, default=6, help="runs of each tree")
    parser.add_argument("--json", type=Path, help="add one JSON object for each case to this file")
    parser.add_argument("benchmark", choices=CASES)
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="what the benchmark itself is given"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
