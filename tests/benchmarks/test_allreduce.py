"""The benchmark of all-reduces gives no time for a wrong sum, and its figures are right."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.allreduce import __main__ as allreduce
from benchmarks.allreduce import measure as collectives
from benchmarks.allreduce.records import make_records
from benchmarks.allreduce.sizes import size_bytes
from benchmarks.common.ranks import run_ranks


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_sum_gets_no_time() -> None:
    wrong = collectives.Variant("wrong", one_element_off_on_rank_1)
    plan = collectives.Plan(elements=30, variants=(collectives.VARIANTS["gloo"], wrong), rounds=1)
    # Element 29 of rank r is (29 + r) mod 13: 3 and 4.
    found = r"rank 1: wrong float32: element 29 of 30 is 8 where the sum is 7\. No time is reported"
    with pytest.raises(Exception, match=found):
        run_ranks(collectives.measure, 2, plan, limit_s=240)


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
