"""Train a small byte-level GPT on the source text of Python's standard library.

    torchrun --nproc-per-node 2 examples/train_gpt.py      # two ranks
    python examples/train_gpt.py                           # one process, same script

The data of a rank at a step depends on (seed, step, rank) alone. So a run that was stopped and
resumed ends with exactly the same weights as one that was not. This holds on the CPU; some CUDA
kernels do not add in a fixed order.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sysconfig
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

import fastddp


@dataclass(frozen=True)
class Config:
    """The options that define a run, except for its length. Each is a command-line option."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 8
    seed: int = 0


# Data ---------------------------------------------------------------------------------------------

SKIPPED_FOLDERS = {"site-packages", "test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
TRAIN_BYTES, HELD_OUT_BYTES = 4 << 20, 64 << 10


def stdlib_files() -> tuple[list[Path], list[Path]]:
    """Returns the files to train on and, every tenth, the files held out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted([*root.glob("*.py"), *root.glob("*/*.py")])
    paths = [path for path in paths if path.parent.name not in SKIPPED_FOLDERS]
    return [path for i, path in enumerate(paths) if i % 10], paths[::10]


def read_bytes(paths: list[Path], limit: int) -> Tensor:
    """Returns the first ``limit`` bytes of the files, laid end to end, as a uint8 tensor."""
    text = b"".join(path.read_bytes() for path in paths)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def training_windows(data: Tensor, config: Config, step: int, rank: int) -> Tensor:
    """Draws this rank's windows of this step, (batch, context + 1): inputs and one last target."""
    draw = random.Random(f"{config.seed} {step} {rank}")
    starts = [draw.randrange(len(data) - config.context) for _ in range(config.batch)]
    return torch.stack([data[start : start + config.context + 1] for start in starts])


# Model --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.query_key_value(self.norm_attention(x))
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer over bytes; the output layer is the embedding, transposed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_byte = nn.Embedding(256, config.width)
        self.embed_position = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.width)
        for embedding in (self.embed_byte, self.embed_position):
            nn.init.normal_(embedding.weight, std=config.width**-0.5)  # logits start at unit scale

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_byte(tokens) + self.embed_position.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed_byte.weight)


def nats_per_byte(model: nn.Module, windows: Tensor) -> Tensor:
    """Returns the mean cross-entropy of predicting each byte from those before it."""
    windows = windows.long()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def learning_rate(step: int, warmup: int = 100, peak: float = 3e-3) -> float:
    """Rises linearly, then falls as 1/sqrt(step), which unlike a cosine needs no last step."""
    return peak * min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)


# Ranks --------------------------------------------------------------------------------------------


def data_parallel(model: nn.Module, kind: str) -> nn.Module:
    """Wraps the model. This is the whole difference between torch's class and fastddp."""
    if kind == "fastddp":
        return fastddp.wrap(model)

    if "RANK" not in os.environ:  # plain python, not torchrun
        return model
    on_gpu = next(model.parameters()).is_cuda
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return nn.parallel.DistributedDataParallel(model)


def exposed_communication_ms(model: nn.Module) -> float | None:
    """Returns the mean time that a step waited for communication; None if it is not measured."""
    if not isinstance(model, fastddp.DistributedDataParallel):
        return None
    stats = model.stats()
    return stats.wait_us_total / max(stats.rounds, 1) / 1e3


def mean_over_ranks(total: float, count: int, device: torch.device) -> float:
    """Returns sum(total) / sum(count) over all ranks, in double precision."""
    sums = torch.tensor([total, count], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


@torch.no_grad()
def held_out_loss(model: GPT, data: Tensor, config: Config, rank: int, world: int) -> float:
    """Evaluates the unwrapped model; every held-out window is counted by exactly one rank."""
    device = next(model.parameters()).device
    windows = data.unfold(0, config.context + 1, config.context)[rank::world].to(device)
    total = sum(nats_per_byte(model, part).item() * len(part) for part in windows.split(32))
    return mean_over_ranks(total, len(windows), device)


# Checkpoints --------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, model: GPT, optimizer: torch.optim.Optimizer, step: int, config: Config
) -> None:
    """Writes beside ``path``, then renames: a reader finds the old checkpoint or the new one."""
    partial = path.with_name(path.name + ".partial")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": asdict(config),
    }
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(
    path: Path, model: GPT, optimizer: torch.optim.Optimizer, config: Config
) -> int:
    """Restores model and optimizer in place and returns the step to continue from."""
    state = torch.load(path, map_location="cpu")
    if state["config"] != asdict(config):
        raise SystemExit(f"{path} was trained with {state['config']}, not with {asdict(config)}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def weights_sha256(model: GPT) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy())
    return digest.hexdigest()


# The run ------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddp", choices=("fastddp", "torch"), default="fastddp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checkpoint", type=Path, help="written every 100 steps and at the end")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--json", type=Path, help="write the results here")
    for field in fields(Config):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    arguments = parser.parse_args()
    if arguments.resume and not arguments.checkpoint:
        parser.error("--resume needs --checkpoint")
    return arguments


def choose_device() -> torch.device:
    """Returns this rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor, step: int
) -> float:
    """Updates the weights and returns this rank's loss. Reading the loss waits for the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    loss = nats_per_byte(model, windows)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def run(arguments: argparse.Namespace) -> None:
    """Trains, evaluates, reports."""
    config = Config(**{field.name: getattr(arguments, field.name) for field in fields(Config)})
    device = choose_device()

    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    first_step = 0
    if arguments.resume:
        first_step = load_checkpoint(arguments.checkpoint, model, optimizer, config)
    if first_step >= arguments.steps:
        raise SystemExit(f"nothing to do: at step {first_step} of {arguments.steps}")

    parallel_model = data_parallel(model, arguments.ddp)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    train_files, held_out_files = stdlib_files()
    train_data = read_bytes(train_files, TRAIN_BYTES)
    step_seconds = []
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, disable=rank != 0) as progress:
        bar = progress.add_task("", total=arguments.steps, completed=first_step)
        for step in range(first_step, arguments.steps):
            began = time.perf_counter()
            windows = training_windows(train_data, config, step, rank).to(device)
            loss = train_step(parallel_model, optimizer, windows, step)
            step_seconds.append(time.perf_counter() - began)

            speed = world * config.batch * config.context / step_seconds[-1]
            note = f"loss {loss:.3f} nats/byte, {speed:,.0f} tokens/s"
            progress.update(bar, advance=1, description=note)
            done = step + 1
            if rank == 0 and arguments.checkpoint and (done % 100 == 0 or done == arguments.steps):
                save_checkpoint(arguments.checkpoint, model, optimizer, done, config)

    held_out_data = read_bytes(held_out_files, HELD_OUT_BYTES)
    results = {
        "ddp": arguments.ddp,
        "world_size": world,
        "device": device.type,
        "steps": arguments.steps,
        "train_loss": mean_over_ranks(loss, 1, device),
        "held_out_loss": held_out_loss(model, held_out_data, config, rank, world),
        "step_ms": statistics.median(step_seconds) * 1e3,
        "exposed_ms": exposed_communication_ms(parallel_model),
        "weights_sha256": weights_sha256(model),
    }
    if rank == 0:
        print(
            f"{arguments.ddp}, {world} rank(s): held-out loss {results['held_out_loss']:.4f} "
            f"nats/byte, median step {results['step_ms']:.1f} ms"
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    run(parse_arguments())
    # Not inside run(): a torch DDP that outlives its process group can hang when it is freed.
    if dist.is_initialized():
        dist.barrier()  # a gloo thread still holding the last tensor aborts an ending interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
