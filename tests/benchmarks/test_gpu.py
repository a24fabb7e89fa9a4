"""The benchmark for GPUs, as far as the CPU shows: it verifies, counts and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.common.ranks import run_ranks
from benchmarks.common.report import append_json
from benchmarks.common.trials import WrongResultError
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import device
from benchmarks.gpu import steps as gpu_steps
from benchmarks.step.models import MODELS
from benchmarks.step.replica import Replica
from benchmarks.step.variants import available

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU, and torch sees none here"):
        gpu.main([])


def test_passes_are_verified_and_compared_with_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    records = gpu.bandwidth(CPU, 8, 2, {})
    by_case = {record.case: record for record in records}
    copy = by_case[device.COPY]
    assert copy.copy_share is None
    assert copy.gb_s == pytest.approx(16e6 / copy.us / 1e3)
    assert by_case["flatten to bfloat16"].gb_s == pytest.approx(
        12e6 / by_case["flatten to bfloat16"].us / 1e3
    )
    for name in ("flatten float32", "unflatten from bfloat16"):
        share = by_case[name].copy_share
        assert share.value == pytest.approx(by_case[name].gb_s / copy.gb_s)
    gpu.print_passes(Console(width=160), records)
    assert "bandwidth: 8 MB, 2 rounds" in capsys.readouterr().out


def test_tiny_tensors_are_compared_with_copies_one_by_one(tmp_path: Path) -> None:
    records = gpu.tiny(CPU, 50, 2, {"gpu": "none"})
    assert records[0].case == device.ONE_BY_ONE
    assert {record.case for record in records} >= {device.FUSED, "torch.cat"}
    ours = records[-1]
    assert ours.one_by_one_ratio.value == pytest.approx(records[0].us / ours.us)
    assert ours.host_us > 0
    append_json(tmp_path / "lines", records)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(line["tensors"], line["machine"]) for line in lines] == [(50, {"gpu": "none"})] * 4


def test_a_wrong_pass_gets_no_time() -> None:
    passes = device.tiny_passes(CPU, 5)
    passes["nothing"] = device.Pass(lambda: None, 1, lambda: "nothing was done")
    with pytest.raises(WrongResultError, match=r"nothing: nothing was done\. No time is reported"):
        device.verify(passes)


def test_gradients_that_are_off_are_seen() -> None:
    model = MODELS["tiny"]
    replicas = {
        name: Replica(gpu_steps.ALL_VARIANTS["nosync"], model.build(0), model, None)
        for name in ("torch", "fastddp", "fastddp-bf16")
    }
    for name, replica in replicas.items():
        replica.variant = gpu_steps.ALL_VARIANTS[name]
        replica.backward(model.batch(0, 0))
    assert gpu_steps._first_problem(replicas) is None
    weight = replicas["fastddp-bf16"].bare.layers[3].weight
    weight.grad.mul_(1 + 2**-9)  # as rounding would
    assert gpu_steps._first_problem(replicas) is None
    replicas["fastddp"].bare.layers[3].weight.grad.mul_(1 + 2**-9)
    assert (
        gpu_steps._first_problem(replicas) == "fastddp: layers.3.weight is off by 0.002 of its norm"
    )
    replicas["fastddp"].bare.layers[3].weight.grad = None
    assert "other parameters than torch's" in gpu_steps._first_problem(replicas)


def test_casting_is_compared_among_several_gpus_only() -> None:
    parts = gpu.step_parts(["steps", "bf16"], 1)
    assert list(parts) == ["steps"]
    assert gpu.step_parts(["steps", "bf16"], 2)["bf16"] == [
        *("nosync", "torch", "torch-bf16", "fastddp-bf16")
    ]
    assert gpu.step_parts(["tiny"], 2) == {}


def test_figures_of_known_steps() -> None:
    plan = gpu_steps.StepPlan(model="tiny", variants=("nosync", "torch", "fastddp"), rounds=2)
    times = {"nosync": [1.0, 1.0], "torch": [2.0, 2.0], "fastddp": [1.25, 1.25]}
    slower = {name: [2 * value for value in values] for name, values in times.items()}
    results = [
        gpu_steps.StepResult(gradient_bytes=8, step_ms=one, host_ms=one, cpu_ms=one)
        for one in (times, slower)
    ]
    bare, torchs, ours = gpu.step_records("steps", plan, results, {})
    assert (bare.step_ms, torchs.step_ms, ours.step_ms) == (2.0, 4.0, 2.5)  # of the slowest rank
    assert bare.own_host_us is bare.host_share is torchs.host_share is torchs.ratio is None
    assert (ours.ratio.value, ours.own_host_us.value, ours.host_share.value) == (1.6, 500, 0.25)
    assert torchs.own_cpu_us.value == 2000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_run_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    variants = [name for name in gpu_steps.VARIANTS if name in available()]
    plan = gpu_steps.StepPlan(
        model="tiny",
        variants=(*variants, gpu_steps.OURS_BF16),
        rounds=2,
        device_type="cpu",
    )
    results = run_ranks(gpu_steps.measure_steps, 2, plan, limit_s=240)
    records = gpu.step_records("steps", plan, results, {})
    assert [record.variant for record in records] == list(plan.variants)
    for record in records:
        assert record.gradient_bytes == 1_088_000
        assert len(record.step_ms_rounds) == 2
        assert record.cpu_ms > 0
    gpu.print_steps(Console(width=200), records)
    assert "tiny: 1.1 MB of gradients, 2 GPU(s)" in capsys.readouterr().out


def _unsynchronised(module: nn.Module, groups: object) -> nn.Module:
    return module


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_variant_gets_no_time() -> None:
    plan = gpu_steps.StepPlan(
        model="tiny", variants=("torch", "wrong"), rounds=1, device_type="cpu"
    )
    with pytest.raises(
        Exception, match=r"wrong: layers\.\d+\.\w+ is off by .* No time is reported"
    ):
        run_ranks(_measure_a_wrong_one, 2, plan, limit_s=240)


def _measure_a_wrong_one(plan: gpu_steps.StepPlan) -> gpu_steps.StepResult:
    gpu_steps.ALL_VARIANTS["wrong"] = gpu_steps.Variant("wrong", _unsynchronised)
    return gpu_steps.measure_steps(plan)
