"""How long does a training step take? `python -m benchmarks.step --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.common.machine import describe
from benchmarks.common.ranks import run_ranks
from benchmarks.common.report import append_json, print_machine
from benchmarks.step.measure import Plan, measure, measure_memory
from benchmarks.step.models import MODELS
from benchmarks.step.records import make_records, print_table
from benchmarks.step.variants import VARIANTS, available


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if Console().is_terminal else 160)
    machine = describe()
    print_machine(console, machine)
    missing = [name for name in options.variants if name not in available()]
    if missing:
        console.print(f"not installed here, left out: {', '.join(missing)}", highlight=False)
    variants = tuple(VARIANTS[name] for name in options.variants if name not in missing)
    for model in options.models:
        plan = Plan(model=model, variants=variants, rounds=options.rounds, warmup=options.warmup)
        results = run_ranks(
            measure, options.ranks, plan, threads=options.threads, limit_s=options.limit
        )
        records = make_records(
            plan,
            results,
            threads=options.threads,
            machine=machine,
            pss_peak_bytes=memory(plan, options) if options.memory else {},
        )
        print_table(console, records)
        if options.json:
            append_json(options.json, records)


def memory(plan: Plan, options: argparse.Namespace) -> dict[str, int]:
    """Measures each variant in processes of its own, because memory of others would count too."""
    return {
        variant.name: max(
            run_ranks(
                measure_memory,
                options.ranks,
                Plan(model=plan.model, variants=(variant,), rounds=1),
                threads=options.threads,
                limit_s=options.limit,
            )
        )
        for variant in plan.variants
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each rank")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each variant")
    parser.add_argument(
        "--warmup",
        type=int,
        default=5,
        help="verified steps before the first timed one, at least 5",
    )
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak PSS, one run for each variant"
    )
    parser.add_argument(
        "--limit", type=float, default=1800, help="seconds after which a run is given up"
    )
    parser.add_argument(
        "--json", type=Path, help="add one JSON object for each variant to this file"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
