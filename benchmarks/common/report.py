"""What every benchmark prints and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.stats import Estimate


def append_json(path: Path, records: Sequence[Any]) -> None:
    """Add dataclass instances to a file, one JSON object a line."""
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def print_machine(console: Console, machine: Mapping[str, str | int | float]) -> None:
    console.print(
        "{cpu}, {cores} cores, {memory_gib} GiB, load {load}; "
        "python {python}, torch {torch}, fastddp {fastddp}".format(**machine),
        highlight=False,
    )


def print_columns(console: Console, title: str, cells: Mapping[str, Sequence[str]]) -> None:
    """A table of columns by heading, without those that are empty."""
    table = Table(title=title, title_justify="left")
    columns = {heading: column for heading, column in cells.items() if any(column)}
    for heading in columns:
        words = heading in ("variant", "dtype", "verified")
        table.add_column(heading, justify="left" if words else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)


def shown(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "?"
    return f"{estimate.value:{form}} ({estimate.low:{form}}..{estimate.high:{form}})"
