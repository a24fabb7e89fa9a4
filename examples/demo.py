"""Train the same GPT with torch's DistributedDataParallel and with fastddp, and compare.

    python examples/demo.py            # a few minutes on two CPU cores
    python examples/demo.py --short    # under a minute

The runs alternate (torch, fastddp, fastddp, torch), so that a machine that warms up or slows down
does not favour one side. The exit status is non-zero if a run fails or the losses differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table

ORDER = ("torch", "fastddp", "fastddp", "torch")
SHORT = ("--steps", "40", "--layers", "2", "--width", "64", "--heads", "2")

# Two ranks add two numbers, and a sum of two numbers has one order only, so on the CPU we expect no
# difference at all. The tolerance is for GPUs, where some kernels do not add in a fixed order.
LOSS_TOLERANCE = 1e-3


def train(ddp: str, options: tuple[str, ...]) -> dict:
    """Runs train_gpt.py on two ranks and returns what it measured."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < 2:  # not a GPU for each rank
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        script = Path(__file__).with_name("train_gpt.py")
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        subprocess.run(
            [sys.executable, *torchrun, script, "--ddp", ddp, "--json", result, *options],
            env=environment,
            check=True,
        )
        return json.loads(result.read_text())


def comparison(torch_runs: list[dict], fastddp_runs: list[dict]) -> Table:
    table = Table("two ranks, two runs each", title="The same training")
    for ddp in ("torch", "fastddp"):
        table.add_column(ddp, justify="right")

    def add_row(name: str, key: str, format_spec: str) -> None:
        cells = []
        for runs in (torch_runs, fastddp_runs):
            values = [run[key] for run in runs if run[key] is not None]
            distinct = dict.fromkeys(format(value, format_spec) for value in values)
            cells.append(", ".join(distinct) or "not known")
        table.add_row(name, *cells)

    add_row("train loss, nats/byte", "train_loss", ".6f")
    add_row("held-out loss, nats/byte", "held_out_loss", ".6f")
    add_row("sha256 of the weights", "weights_sha256", ".12")
    add_row("median step, ms", "step_ms", ".1f")
    add_row("waiting for communication, ms per step", "exposed_ms", ".2f")
    return table


def loss_difference(runs: list[dict]) -> float:
    """Returns the largest difference between the runs, in either of the two losses."""
    losses = [[run[key] for run in runs] for key in ("train_loss", "held_out_loss")]
    return max(max(values) - min(values) for values in losses)


def machine(device: str) -> str:
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    gpu = f" and {torch.cuda.get_device_name()}" if device == "cuda" else ""
    cpu = torch.backends.cpu.get_cpu_capability()
    load = os.getloadavg()[0]  # two ranks alone make about 2
    return f"{cores} ({cpu}){gpu} under a load of {load:.1f}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a smaller model and fewer steps")
    options = SHORT if parser.parse_args().short else ()
    console = Console(highlight=False)

    runs: dict[str, list[dict]] = {"torch": [], "fastddp": []}
    for number, ddp in enumerate(ORDER, 1):
        console.rule(f"run {number} of {len(ORDER)}: {ddp}")
        try:
            runs[ddp].append(train(ddp, options))
        except subprocess.CalledProcessError as error:
            sys.exit(f"run {number} ({ddp}) failed with exit status {error.returncode}")

    every_run = runs["torch"] + runs["fastddp"]
    difference = loss_difference(every_run)
    losses = f"differ by {difference:.1e}" if difference else "equal to the last bit"
    one_hash = len({run["weights_sha256"] for run in every_run}) == 1
    weights = "equal to the last bit" if one_hash else "different"
    torch_ms, fastddp_ms = (mean(run["step_ms"] for run in side) for side in runs.values())

    console.print(comparison(runs["torch"], runs["fastddp"]))
    console.print(f"Losses: {losses}. Weights: {weights}.")
    console.print(f"Step time, torch / fastddp: {torch_ms / fastddp_ms:.2f}.")
    console.print(f"Measured on {machine(every_run[0]['device'])}.")
    console.print("Times of runs this short are a hint; two runs of one side differ, too.")
    if difference > LOSS_TOLERANCE:
        sys.exit(f"the losses differ by {difference}, more than {LOSS_TOLERANCE}")


if __name__ == "__main__":
    main()
