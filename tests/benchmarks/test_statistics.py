"""The figures that the benchmarks print are right on known times."""

from __future__ import annotations

import pytest

from benchmarks.common.stats import (
    best,
    estimate,
    median,
    quantile,
    share_removed,
    slowest_rank,
)
from benchmarks.common.trials import turn_order
from benchmarks.step.records import figures
from benchmarks.step.variants import VARIANTS


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
