"""How fast are ranks on two hosts? `python -m benchmarks.hosts --help`.

The hosts are network namespaces of this machine, joined by a link of limited speed. Needs root.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.allreduce import measure as sums
from benchmarks.allreduce import records as sum_records
from benchmarks.allreduce.sizes import size, size_bytes
from benchmarks.common.machine import describe
from benchmarks.common.namespaces import two_hosts, why_not
from benchmarks.common.ranks import run_ranks
from benchmarks.common.report import append_json, print_machine
from benchmarks.step import measure as steps
from benchmarks.step import records as step_records
from benchmarks.step import variants
from benchmarks.step.models import MODELS

SIZES = ("1KiB", "1MiB", "25MiB", "100MiB")
ALLREDUCES = ("gloo", "shm", "shm-copied")
STEPS = (variants.NOSYNC, variants.TORCH, "torch-static", "fastddp")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if Console().is_terminal else 160)
    if (reason := why_not()) is not None:
        raise SystemExit(f"there cannot be two hosts here: {reason}")
    machine = {**describe(), "hosts": 2, "link_mbit": options.mbit}
    print_machine(console, machine)
    with two_hosts(options.mbit) as hosts:
        for text in options.sizes:
            plan = sums.Plan(
                elements=max(size_bytes(text) // 4, 1),
                variants=tuple(sums.VARIANTS[name] for name in ALLREDUCES),
                dtypes=(torch.float32,),
                rounds=options.rounds,
            )
            times = run_ranks(sums.measure, options.ranks, plan, hosts=hosts)
            records = sum_records.make_records(text, plan, times, threads=1, machine=machine)
            sum_records.print_records(console, records)
            wire_us = plan.elements * 4 * 8 / options.mbit
            console.print(f"one operand takes the link {wire_us:.0f} us", highlight=False)
            if options.json:
                append_json(options.json, records)
        for model in options.models:
            plan = steps.Plan(
                model=model,
                variants=tuple(variants.VARIANTS[name] for name in STEPS),
                rounds=options.rounds,
            )
            results = run_ranks(steps.measure, options.ranks, plan, hosts=hosts)
            records = step_records.make_records(
                plan, results, threads=1, machine=machine, pss_peak_bytes={}
            )
            step_records.print_table(console, records)
            if options.json:
                append_json(options.json, records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=__doc__)
    parser.add_argument(
        "--sizes",
        nargs="*",
        type=size,
        default=list(SIZES),
        metavar="SIZE",
        help=f"sizes of the operand of an all-reduce, by default {' '.join(SIZES)}",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        choices=MODELS,
        default=[],
        metavar="MODEL",
        help=f"models to time steps of: {', '.join(MODELS)}; by default none",
    )
    parser.add_argument("--ranks", type=int, default=4, help="ranks, half of them on each host")
    parser.add_argument("--mbit", type=int, default=1000, help="link speed each way, Mbit/s")
    parser.add_argument("--rounds", type=int, default=10, help="timed batches of each case")
    parser.add_argument("--json", type=Path, help="add one JSON object for each case to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
