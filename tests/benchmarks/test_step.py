"""The models that the benchmark of steps trains, and a short run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.step.__main__ import main
from benchmarks.step.models import MODELS, gradient_bytes
from benchmarks.step.variants import VARIANTS, available
from benchmarks.step.verify import first_difference


def test_models_have_the_sizes_they_stand_for() -> None:
    sizes = {name: gradient_bytes(model.build(0)) for name, model in MODELS.items()}
    assert sizes["cnn"] == 4 * 25_557_032  # ResNet-50
    assert sizes["mlp"] == 12_595_200
    assert sizes["wide"] > 100_000_000
    assert len(list(MODELS["tiny"].build(0).parameters())) == 2000
    assert sizes["unused"] == sizes["tiny"]
    assert len(sizes) == 6


def test_the_model_with_unused_parameters_leaves_out_three_in_ten() -> None:
    model = MODELS["unused"]
    module, batch = model.build(0), model.batch(0, 0)
    model.loss(module(batch.inputs), batch.targets).backward()
    assert sum(p.grad is None for p in module.parameters()) == 600


def test_a_seed_names_the_weights_and_a_rank_and_step_the_batch() -> None:
    model = MODELS["mlp"]
    state = torch.get_rng_state()
    first, again = model.build(3), model.build(3)
    assert first_difference(first.state_dict(), again.state_dict()) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.batch(1, 2).inputs, model.batch(1, 2).inputs)
    assert not torch.equal(model.batch(1, 2).inputs, model.batch(0, 2).inputs)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "verified", "names"),
    [
        (2, "bitwise", list(VARIANTS)),
        (3, "within rounding", ["torch", "torch-view", "fastddp", "fastddp-python"]),
    ],
)
def test_a_short_run_writes_a_record_for_each_variant(
    tmp_path: Path, ranks: int, verified: str, names: list[str]
) -> None:
    path = tmp_path / "steps.jsonl"
    arguments = ["--models", "tiny", "--ranks", str(ranks), "--rounds", "2", "--json", str(path)]
    main([*arguments, "--variants", *names])
    found = {r["variant"]: r for r in map(json.loads, path.read_text().splitlines())}
    assert found.keys() == set(names) & set(available())
    for name, record in found.items():
        assert record["ranks"] == ranks
        assert len(record["step_ms_rounds"]) == 2
        assert record["gradient_bytes"] == 1_088_000
        assert record["verified"] == (verified if VARIANTS[name].synchronises else "no")
        assert record["machine"]["torch"]
