"""The tables that benchmarks print and the records that they write."""

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
    """Adds dataclass instances to a file, as one JSON object per line."""
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def print_machine(console: Console, machine: Mapping[str, str | int | float]) -> None:
    """Prints the machine and the versions, as `benchmarks.common.machine.describe` returns them."""
    console.print(
        "{cpu}, {cores} cores, {memory_gib} GiB, load {load}; "
        "python {python}, torch {torch}, fastddp {fastddp}".format(**machine),
        highlight=False,
    )


def print_columns(console: Console, title: str, cells: Mapping[str, Sequence[str]]) -> None:
    """Prints a table with a column for each heading, and leaves out empty columns."""
    table = Table(title=title, title_justify="left")
    columns = {heading: column for heading, column in cells.items() if any(column)}
    for heading in columns:
        words = heading in ("variant", "dtype", "verified")
        table.add_column(heading, justify="left" if words else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)


def shown(estimate: Estimate | None, form: str) -> str:
    """Returns an estimate and its interval as text; "" for none, "?" if noise hides it."""
    if estimate is None:
        return ""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "?"
    return f"{estimate.value:{form}} ({estimate.low:{form}}..{estimate.high:{form}})"
