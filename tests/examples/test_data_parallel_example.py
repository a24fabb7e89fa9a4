"""The one-process example does what it says, whatever the number of replicas."""

from __future__ import annotations

import re

import pytest

from tests.examples.test_examples import run_example


def accuracies(output: str) -> list[float]:
    return [float(text) for text in re.findall(r"test accuracy ([\d.]+)", output)]


def test_replicas_learn_what_one_process_learns() -> None:
    split, whole = (
        run_example("data_parallel.py", "--epochs", "2", "--replicas", count, ranks=0)
        for count in ("3", "1")
    )
    assert "replicas on cpu, cpu, cpu\n" in split
    assert len(accuracies(split)) == 2
    assert accuracies(split)[-1] > 0.9
    # The same batches from the same weights. Only the order of some sums differs, so that one
    # image in 360 may end on another side.
    assert accuracies(split)[-1] == pytest.approx(accuracies(whole)[-1], abs=1.5 / 360)
