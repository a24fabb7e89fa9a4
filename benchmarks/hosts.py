"""How fast are ranks on two hosts? `python -m benchmarks.hosts --help`.

The hosts are network namespaces of this machine that a link of limited speed joins: it needs root.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import allreduce, collectives, harness, report, variants
from benchmarks.machine import describe
from benchmarks.models import MODELS
from benchmarks.namespaces import two_hosts, why_not
from benchmarks.ranks import run_ranks

SIZES = ("1KiB", "1MiB", "25MiB", "100MiB")
ALLREDUCES = ("gloo", "shm", "shm-copied")
STEPS = (variants.NOSYNC, variants.TORCH, "torch-static", "fastddp")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if Console().is_terminal else 160)
    if (reason := why_not()) is not None:
        raise SystemExit(f"there cannot be two hosts here: {reason}")
    machine = {**describe(), "hosts": 2, "link_mbit": options.mbit}
    report.print_machine(console, machine)
    with two_hosts(options.mbit) as hosts:
        for size in options.sizes:
            sums = collectives.Plan(
                elements=max(allreduce.size_bytes(size) // 4, 1),
                variants=tuple(collectives.VARIANTS[name] for name in ALLREDUCES),
                dtypes=(torch.float32,),
                rounds=options.rounds,
            )
            times = run_ranks(collectives.measure, options.ranks, sums, hosts=hosts)
            records = allreduce.make_records(size, sums, times, threads=1, machine=machine)
            allreduce.print_records(console, records)
            wire_us = sums.elements * 4 * 8 / options.mbit
            console.print(f"one operand takes the link {wire_us:.0f} us", highlight=False)
            if options.json:
                report.append_json(options.json, records)
        for model in options.models:
            steps = harness.Plan(
                model=model,
                variants=tuple(variants.VARIANTS[name] for name in STEPS),
                rounds=options.rounds,
            )
            results = run_ranks(harness.measure, options.ranks, steps, hosts=hosts)
            step_records = report.make_records(
                steps, results, threads=1, machine=machine, pss_peak_bytes={}
            )
            report.print_table(console, step_records)
            if options.json:
                report.append_json(options.json, step_records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=__doc__)
    parser.add_argument(
        "--sizes",
        nargs="*",
        type=allreduce.size,
        default=list(SIZES),
        metavar="SIZE",
        help=f"of the operand of an all-reduce, by default {' '.join(SIZES)}",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        choices=MODELS,
        default=[],
        metavar="MODEL",
        help=f"to time steps of, of {', '.join(MODELS)}; by default none",
    )
    parser.add_argument("--ranks", type=int, default=4, help="together; half of them on each host")
    parser.add_argument("--mbit", type=int, default=1000, help="of the link, Mbit/s, either way")
    parser.add_argument("--rounds", type=int, default=10, help="timed batches of each case")
    parser.add_argument("--json", type=Path, help="add one JSON object for each case to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
