"""The benchmark harness refuses wrong results, and its figures are right on known inputs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks.allreduce import __main__ as allreduce  # noqa: E402
from benchmarks.allreduce import measure as collectives  # noqa: E402
from benchmarks.allreduce.records import make_records  # noqa: E402
from benchmarks.allreduce.sizes import size_bytes  # noqa: E402
from benchmarks.common.ranks import run_ranks  # noqa: E402
from benchmarks.common.stats import (  # noqa: E402
    best,
    estimate,
    median,
    quantile,
    share_removed,
    slowest_rank,
)
from benchmarks.common.trials import turn_order  # noqa: E402
from benchmarks.startup.__main__ import run_probe  # noqa: E402
from benchmarks.step.__main__ import main  # noqa: E402
from benchmarks.step.measure import Plan, measure  # noqa: E402
from benchmarks.step.models import MODELS, gradient_bytes  # noqa: E402
from benchmarks.step.records import figures  # noqa: E402
from benchmarks.step.variants import VARIANTS, Groups, Variant, available  # noqa: E402
from benchmarks.step.verify import first_difference  # noqa: E402


def slightly_off_on_rank_1(module: nn.Module, groups: Groups) -> nn.Module:
    """Torch's DDP, but on one rank one element of the bucket is off by about one rounding."""

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        average = bucket.buffer().div_(dist.get_world_size())
        dist.all_reduce(average)
        average[-1] *= 1 + 2**-22 * dist.get_rank()
        future = torch.futures.Future()
        future.set_result(average)
        return future

    wrapped = TorchDDP(module, process_group=groups.real)
    wrapped.register_comm_hook(None, hook)
    return wrapped


def unsynchronised(module: nn.Module, _groups: Groups) -> nn.Module:
    return module


# Verification


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wrap", [slightly_off_on_rank_1, unsynchronised])
def test_a_wrong_variant_gets_no_time(wrap: object) -> None:
    wrong = Variant("wrong", wrap)  # type: ignore[arg-type]
    plan = Plan(model="tiny", variants=(VARIANTS["torch"], wrong), rounds=1)
    with pytest.raises(Exception, match=r"rank \d: wrong, backward 1: layers.*No time is reported"):
        run_ranks(measure, 2, plan, limit_s=240)


def test_verification_needs_its_reference() -> None:
    with pytest.raises(ValueError, match="'torch' is what the others are verified against"):
        measure(Plan(model="tiny", variants=(VARIANTS["nosync"],)))


def test_a_plan_with_too_little_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup is 4"):
        Plan(model="tiny", variants=(), warmup=4)


def test_first_difference_sees_one_bit() -> None:
    right = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    wrong = {**right, "a": torch.tensor([1.0, 2.0 + 2**-22])}
    assert first_difference(right, dict(right)) is None
    assert first_difference(right, wrong) == "a[1] of 2 is 2.00000024 where torch has 2"


def test_first_difference_sees_a_missing_tensor() -> None:
    one = {"a": torch.zeros(1)}
    assert first_difference(one, {}) == "only torch has a"
    assert first_difference({}, one) == "only the variant has a"


def test_first_difference_allows_its_bound_and_no_more() -> None:
    right, bound = {"a": torch.tensor([1.0])}, {"a": torch.tensor([0.25])}
    assert first_difference(right, {"a": torch.tensor([1.25])}, bound) is None
    assert first_difference(right, {"a": torch.tensor([1.5])}, bound) is not None
    assert first_difference(right, {"a": torch.tensor([torch.nan])}, bound) is not None


def one_element_off_on_rank_1(
    group: dist.ProcessGroup, elements: int, dtype: torch.dtype
) -> collectives.Operand:
    """Gloo, but the last element on one rank is the next larger number."""
    tensor = torch.empty(elements, dtype=dtype)

    def loop(calls: int) -> float:
        for _ in range(calls):
            dist.all_reduce(tensor, group=group)
            tensor[-1] += dist.get_rank(group)
        return 0.0

    return collectives.Operand(loop, tensor)


@pytest.mark.timeout(300)
def test_a_wrong_sum_gets_no_time() -> None:
    wrong = collectives.Variant("wrong", one_element_off_on_rank_1)
    plan = collectives.Plan(elements=30, variants=(collectives.VARIANTS["gloo"], wrong), rounds=1)
    # Element 29 of rank r is (29 + r) mod 13: 3 and 4.
    found = r"rank 1: wrong float32: element 29 of 30 is 8 where the sum is 7\. No time is reported"
    with pytest.raises(Exception, match=found):
        run_ranks(collectives.measure, 2, plan, limit_s=240)


# Order and figures


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_variant_takes_every_place_equally_often(count: int) -> None:
    names = [str(k) for k in range(count)]
    orders = [turn_order(names, number) for number in range(2 * count)]
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(2 * names)


def test_quantiles() -> None:
    assert median([3.0, 1.0, 2.0]) == 2
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert quantile([0.0, 10.0], 0.1) == 1
    assert quantile([5.0], 0.9) == 5


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest_rank([[1.0, 5.0], [2.0, 3.0]]) == [2, 5]
    with pytest.raises(ValueError, match="longer"):
        slowest_rank([[1.0], [2.0, 3.0]])


def test_best_looks_at_medians_of_what_was_measured() -> None:
    assert best({"a": [1.0, 9.0, 9.0], "b": [5.0, 5.0, 5.0]}, ["a", "b", "c"]) == "b"


def test_share_removed() -> None:
    assert share_removed(5, of=20) == 0.75
    assert share_removed(30, of=20) == -0.5
    assert share_removed(5, of=0) is None


SAMPLES = {
    "nosync": [100.0] * 4,
    "torch": [130.0] * 4,
    "torch-view": [120.0] * 4,
    "torch-static": [125.0] * 4,
    "torch-noop": [108.0] * 4,
    "torch-view-noop": [104.0] * 4,
    "fastddp": [105.0] * 4,
    "fastddp-noop": [102.0] * 4,
}


def test_figures_of_a_known_run() -> None:
    found = {name: f(SAMPLES) for name, f in figures(VARIANTS["fastddp"], SAMPLES).items()}
    assert found == {
        "ratio": 120 / 105,
        "exposed_ms": 3,
        "removed": 1 - 5 / 20,
        "own_removed": 1 - 2 / 8,
    }
    found = {name: f(SAMPLES) for name, f in figures(VARIANTS["torch-static"], SAMPLES).items()}
    assert found == {"ratio": 120 / 125, "exposed_ms": 21}


def test_kept_memory_is_not_credited_with_torchs_overhead() -> None:
    samples = {**SAMPLES, "fastddp-kept": [60.0] * 4}
    found = {name: f(samples) for name, f in figures(VARIANTS["fastddp-kept"], samples).items()}
    assert found == {"ratio": 2}


def test_figures_need_their_yardsticks() -> None:
    few = {name: SAMPLES[name] for name in ("torch", "fastddp")}
    assert figures(VARIANTS["fastddp"], few).keys() == {"ratio"}


def test_an_estimate_without_noise_has_no_width() -> None:
    found = estimate(SAMPLES, figures(VARIANTS["fastddp"], SAMPLES)["removed"])
    assert (found.value, found.low, found.high) == (0.75, 0.75, 0.75)


def test_noise_common_to_a_round_cancels() -> None:
    noisy = {"a": [10.0, 20.0, 30.0, 40.0], "b": [20.0, 40.0, 60.0, 80.0]}
    found = estimate(noisy, lambda s: median(s["b"]) / median(s["a"]))
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_an_estimate_stays_open_where_the_figure_often_does_not_exist() -> None:
    samples = {"cost": [1.0] * 6, "of": [-1.0, -1.0, -1.0, 2.0, 2.0, 2.0]}
    found = estimate(samples, lambda s: share_removed(median(s["cost"]), of=median(s["of"])))
    assert (found.value, found.low) == (-1, None)
    assert estimate({"x": [1.0]}, lambda _: None).value is None


def case(variant: str, dtype: str, us: list[float]) -> collectives.CaseResult:
    return collectives.CaseResult(variant=variant, dtype=dtype, verified="bitwise", calls=9, us=us)


def test_figures_of_known_all_reduces() -> None:
    rank_0 = [
        case("gloo-cpp", "float32", [100.0, 60.0]),
        case("shm-cpp", "float32", [20.0, 20.0]),
        case("shm-cpp", "bfloat16", [12.0, 12.0]),
        case("mpi", "float32", [50.0, 50.0]),
        case("floor", "float32", [16.0, 16.0]),
    ]
    rank_1 = [case(c.variant, c.dtype, [10.0, 100.0]) for c in rank_0[:1]] + rank_0[1:]
    plan = collectives.Plan(elements=1000, variants=(), rounds=2)
    records = make_records("4000B", plan, [rank_0, rank_1, rank_0, rank_0], threads=1, machine={})
    gloo, shm, shm_bf16, mpi, floor = records
    assert (gloo.us, gloo.us_rounds, gloo.calls) == (100, [100, 100], 9)  # of the slowest rank
    assert gloo.gloo_ratio is gloo.mpi_ratio is gloo.floor_ratio is None
    assert shm.bus_gb_s == pytest.approx(4000 * 1.5 / 20e-6 / 1e9)
    assert shm_bf16.bus_gb_s == pytest.approx(2000 * 1.5 / 12e-6 / 1e9)
    assert (shm.gloo_ratio.value, shm.mpi_ratio.value, shm.floor_ratio.value) == (5, 2.5, 1.25)
    assert shm_bf16.float32_ratio.value == 0.6
    assert shm_bf16.gloo_ratio is shm_bf16.mpi_ratio is None  # neither was measured in bfloat16
    assert (mpi.mpi_ratio, mpi.floor_ratio.value) == (None, 50 / 16)
    assert floor.bus_gb_s is None


def test_sizes_are_read_with_their_unit() -> None:
    sizes = [size_bytes(text) for text in ("4B", "1KiB", "25MiB", "2GiB")]
    assert sizes == [4, 1024, 26_214_400, 2_147_483_648]
    for text in ("25", "0KiB", "1MB", "-1KiB", "1.5MiB"):
        with pytest.raises(argparse.ArgumentTypeError, match="write 64KiB"):
            size_bytes(text)


# Models and runs


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_start_up_probe_reports_its_figures() -> None:
    assert {"import_ms", "first_wrap_ms", "ready_ms", "later_wrap_ms"} <= run_probe("torch").keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_run_times_every_kind_of_all_reduce(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "allreduce.jsonl"
    arguments = ["--sizes", "4B", "8KiB", "--rounds", "2", "--json", str(path)]
    allreduce.main(arguments)
    missing = collectives.unavailable(list(collectives.VARIANTS))
    cases = {
        (size, variant.name, collectives.dtype_name(dtype))
        for size in ("4B", "8KiB")
        for variant in collectives.VARIANTS.values()
        for dtype in variant.dtypes
        if variant.name not in missing
    }
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(cases)
    assert {(r["size"], r["variant"], r["dtype"]) for r in records} == cases
    assert {"gloo", "gloo-cpp", "floor"} <= {r["variant"] for r in records}
    for record in records:
        assert record["elements"] == {"4B": 1, "8KiB": 2048}[record["size"]]
        assert record["verified"] == ("no" if record["variant"] == "floor" else "bitwise")
        assert len(record["us_rounds"]) == record["rounds"] == 2
        assert record["calls"] >= 1
        assert record["machine"]["torch"]
    table = capsys.readouterr().out
    assert sum(
        line.count("│ bitwise ") + line.count("│ no ") for line in table.splitlines()
    ) == len(cases)
    for name in missing:
        assert f"{name}: not available, " in table
