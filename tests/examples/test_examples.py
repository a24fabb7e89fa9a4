"""The examples do what they say, on two ranks and in one plain process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.ranks import LAUNCHER_VARIABLES, run_ranks
from tests.slow import slow_but_for

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
TINY = ("--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "2")
SAME = ("weights_sha256", "train_loss", "held_out_loss")


def run_example(name: str, *options: str | Path, ranks: int) -> str:
    """Run an example, under torchrun unless ranks is 0, and return what it printed."""
    launcher = (*TORCHRUN, str(ranks)) if ranks else ()
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / name, *options],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=55,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def load_train_gpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLES / "train_gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_gpt() -> ModuleType:
    """The GPT example as a module."""
    return load_train_gpt()


def train_body(_rank: int, _world: int, options: list[str]) -> None:
    """Run the GPT example in this rank, whose process group exists already."""
    module = load_train_gpt()
    sys.argv = ["train_gpt.py", *TINY, *options]
    module.run(module.parse_arguments())


def test_gpt_resumes_to_identical_weights(
    tmp_path: Path, train_gpt: ModuleType, engine: str
) -> None:
    result = tmp_path / "result.json"

    def train(steps: int, checkpoint: str, *options: str) -> dict:
        outputs = ["--json", str(result), "--checkpoint", str(tmp_path / checkpoint)]
        environment = {"FASTDDP_ENGINE": engine, "CUDA_VISIBLE_DEVICES": ""}
        run_ranks(train_body, 2, ["--steps", str(steps), *outputs, *options], env=environment)
        return json.loads(result.read_text())

    whole = train(5, "whole.pt")
    half = train(2, "halves.pt")
    resumed = train(5, "halves.pt", "--resume")

    assert whole["world_size"] == 2
    assert half["weights_sha256"] != whole["weights_sha256"]
    for key in SAME:
        assert resumed[key] == whole[key]

    # The checkpoint knows nothing of ranks or wrappers: a plain model loads it.
    saved = torch.load(tmp_path / "halves.pt")
    plain = train_gpt.GPT(train_gpt.Config(**saved["config"]))
    plain.load_state_dict(saved["model"])
    assert train_gpt.weights_sha256(plain) == whole["weights_sha256"]
    assert saved["step"] == 5
    assert not list(tmp_path.glob("*.partial"))


def test_gpt_ends_with_the_bits_of_torchs_ddp(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    results = []
    for ddp in ("torch", "fastddp"):
        options = (*TINY, "--steps", "3", "--ddp", ddp, "--json", result)
        run_example("train_gpt.py", *options, ranks=2)
        results.append(json.loads(result.read_text()))
    for key in SAME:
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("ddp", ["torch", "fastddp"])
def test_gpt_runs_in_a_plain_process(ddp: str) -> None:
    output = run_example("train_gpt.py", *TINY, "--steps", "2", "--ddp", ddp, ranks=0)
    assert f"{ddp}, 1 rank(s)" in output


def test_gpt_checkpoint_of_another_model_is_refused(tmp_path: Path, train_gpt: ModuleType) -> None:
    small, large = train_gpt.Config(layers=1), train_gpt.Config(layers=2)
    model = train_gpt.GPT(small)
    optimizer = torch.optim.AdamW(model.parameters())
    train_gpt.save_checkpoint(tmp_path / "model.pt", model, optimizer, 1, small)
    with pytest.raises(SystemExit, match=r"'layers': 1.*'layers': 2"):
        train_gpt.load_checkpoint(tmp_path / "model.pt", model, optimizer, large)


def test_stdlib_text_is_deterministic_and_split_by_file(train_gpt: ModuleType) -> None:
    train, held_out = train_gpt.stdlib_files()
    assert (train, held_out) == train_gpt.stdlib_files()
    assert set(train).isdisjoint(held_out)
    assert len(train) > 100
    assert len(held_out) > 10
    assert not any("site-packages" in path.parts for path in train + held_out)

    text = train_gpt.read_bytes(held_out, train_gpt.HELD_OUT_BYTES)
    assert len(text) == train_gpt.HELD_OUT_BYTES
    assert torch.equal(text, train_gpt.read_bytes(held_out, train_gpt.HELD_OUT_BYTES))


def test_training_windows_depend_on_seed_step_and_rank_only(train_gpt: ModuleType) -> None:
    data = torch.randint(256, (10_000,), dtype=torch.uint8)
    config, other_seed = train_gpt.Config(), train_gpt.Config(seed=1)

    def draw(config: object, step: int, rank: int) -> torch.Tensor:
        return train_gpt.training_windows(data, config, step, rank)

    first = draw(config, 3, 1)
    assert first.shape == (config.batch, config.context + 1)
    assert torch.equal(first, draw(config, 3, 1))
    for other in (draw(config, 4, 1), draw(config, 3, 0), draw(other_seed, 3, 1)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("ranks", slow_but_for([2], [0, 2]))
def test_digits_reaches_its_accuracy(ranks: int) -> None:
    output = run_example("train_digits.py", "--epochs", "4", ranks=ranks)
    accuracies = [float(text) for text in re.findall(r"test accuracy ([\d.]+)", output)]
    assert len(accuracies) == 4  # printed by one rank only
    assert max(accuracies) > 0.97
