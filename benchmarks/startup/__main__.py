"""How much time and memory does it take to begin? `python -m benchmarks.startup --help`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.report import append_json, print_machine
from benchmarks.common.stats import median, quantile

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("torch", "fastddp")


@dataclass(frozen=True, kw_only=True)
class StartupRecord:
    """One figure of one side. `docs/benchmarks.md` explains each figure."""

    side: str
    figure: str
    median: float
    p10: float
    p90: float
    samples: list[float]
    machine: Mapping[str, str | int | float]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    machine = describe()
    print_machine(console, machine)
    for side in SIDES:  # not counted, because it fills the page cache and writes bytecode
        run_probe(side)
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            samples[side].append(run_probe(side))
    records = [
        summarise(side, figure, [sample[figure] for sample in samples[side]], machine)
        for figure in samples["torch"][0]
        for side in SIDES
    ]
    print_startup(console, records)
    if options.json:
        append_json(options.json, records)


def run_probe(side: str) -> dict[str, float]:
    """Measures one side in a new interpreter."""
    command = [sys.executable, "-m", "benchmarks.startup.probe", side]
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return json.loads(result.stdout.splitlines()[-1])


def summarise(
    side: str, figure: str, values: list[float], machine: Mapping[str, str | int | float]
) -> StartupRecord:
    return StartupRecord(
        side=side,
        figure=figure,
        median=median(values),
        p10=quantile(values, 0.1),
        p90=quantile(values, 0.9),
        samples=[round(value, 3) for value in values],
        machine=machine,
    )


def print_startup(console: Console, records: list[StartupRecord]) -> None:
    table = Table(
        title=f"start-up, {len(records[0].samples)} fresh processes a side", title_justify="left"
    )
    table.add_column("figure")
    for side in SIDES:
        table.add_column(f"{side} (p10-p90)", justify="right")
    for figure in dict.fromkeys(record.figure for record in records):
        cells = [f"{r.median:.1f} ({r.p10:.1f}-{r.p90:.1f})" for r in records if r.figure == figure]
        table.add_row(figure, *cells)
    console.print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="counted processes a side")
    parser.add_argument(
        "--json", type=Path, help="add one JSON object for each figure and side to this file"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
