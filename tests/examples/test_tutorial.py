"""The tutorial does what it says: it trains, evaluates every point once, and resumes exactly."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastddp
from tests.examples.test_examples import EXAMPLES, run_example
from tests.ranks import run_ranks


def load_tutorial() -> ModuleType:
    path = EXAMPLES / "tutorial_ddp_spawn.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_on_two_ranks_from_plain_python():
    output = run_example("tutorial_ddp_spawn.py", "--epochs", "3", "--ranks", "2", ranks=0)
    accuracies = [float(text) for text in re.findall(r"epoch \d: test accuracy ([\d.]+)", output)]
    assert len(accuracies) == 3  # printed by one rank only
    assert accuracies[-1] > 0.9
    assert f"2 rank(s) trained; final test accuracy {accuracies[-1]:.4f}" in output


def _train(rank: int, _world: int, epochs: int, checkpoint: Path) -> float:
    torch.manual_seed(rank)  # ranks that start apart, which wrap ends
    return load_tutorial().train(rank, epochs, checkpoint)


def test_it_resumes_to_identical_weights(tmp_path):
    whole, halves = tmp_path / "whole.pt", tmp_path / "halves.pt"
    expected = run_ranks(_train, 2, 2, whole)
    run_ranks(_train, 2, 1, halves)
    assert torch.load(halves)["epoch"] == 1
    assert run_ranks(_train, 2, 1, halves) == expected

    saved, resumed = torch.load(whole), torch.load(halves)
    assert saved["epoch"] == resumed["epoch"] == 2
    plain = load_tutorial().make_model()
    plain.load_state_dict(saved["model"])  # a checkpoint knows nothing of ranks or wrappers
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, resumed["model"][name]), name
    assert not list(tmp_path.glob("*.partial"))


def _evaluate(rank: int, world_size: int) -> tuple[float, float]:
    tutorial = load_tutorial()
    torch.manual_seed(0)
    model = fastddp.wrap(tutorial.make_model())
    test = tutorial.make_spiral(301, seed=1)
    points, arms = test.tensors
    expected = (model.module(points).argmax(1) == arms).float().mean().item()
    return tutorial.evaluate(model, test, torch.device("cpu")), expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_its_evaluation_is_that_of_one_process(world_size):
    for over_ranks, alone in run_ranks(_evaluate, world_size):
        assert over_ranks == alone
