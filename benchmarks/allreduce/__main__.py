"""How long does an all-reduce take? `python -m benchmarks.allreduce --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.allreduce.loops import compiled_loops
from benchmarks.allreduce.measure import (
    DTYPES,
    MPI,
    VARIANTS,
    Plan,
    measure,
    unavailable,
)
from benchmarks.allreduce.mpi import mpi_version, run_ranks_under_mpi
from benchmarks.allreduce.records import make_records, print_records
from benchmarks.allreduce.sizes import size, size_bytes
from benchmarks.common.machine import describe
from benchmarks.common.ranks import run_ranks
from benchmarks.common.report import append_json, print_machine

SIZES = ("1KiB", "64KiB", "1MiB", "25MiB", "100MiB")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if Console().is_terminal else 160)
    machine = dict(describe())
    print_machine(console, machine)
    missing = unavailable(options.variants)
    for name, reason in missing.items():
        console.print(f"{name}: not available, {reason}", highlight=False)
    variants = tuple(VARIANTS[name] for name in options.variants if name not in missing)
    run = run_ranks
    if MPI in {variant.name for variant in variants}:
        run = run_ranks_under_mpi
        machine["mpi"] = mpi_version()
        console.print(f"ranks started by mpiexec, {machine['mpi']}", highlight=False)
    if any(variant.compiled for variant in variants):
        compiled_loops()  # now, rather than while the other ranks wait
    for text in options.sizes:
        plan = Plan(
            elements=max(size_bytes(text) // 4, 1),
            variants=variants,
            dtypes=tuple(DTYPES[name] for name in options.dtypes),
            rounds=options.rounds,
        )
        results = run(measure, options.ranks, plan, threads=options.threads, limit_s=options.limit)
        records = make_records(text, plan, results, threads=options.threads, machine=machine)
        print_records(console, records)
        if options.json:
            append_json(options.json, records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allreduce", description=__doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        default=list(SIZES),
        metavar="SIZE",
        help=f"sizes of the float32 operand, by default {' '.join(SIZES)};"
        " other dtypes have as many elements",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each rank")
    parser.add_argument("--rounds", type=int, default=20, help="timed batches of each case")
    parser.add_argument(
        "--limit", type=float, default=1800, help="seconds after which a size is given up"
    )
    parser.add_argument("--json", type=Path, help="add one JSON object for each case to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
