"""The one-process example does what it says, whatever the number of replicas."""

from __future__ import annotations

import re
import runpy

import pytest
import torch

from tests.examples.test_examples import EXAMPLES, run_example


def accuracies(output: str) -> list[float]:
    return [float(text) for text in re.findall(r"test accuracy ([\d.]+)", output)]


def test_replicas_learn_what_one_process_learns(capsys: pytest.CaptureFixture[str]) -> None:
    split = run_example("data_parallel.py", "--epochs", "1", "--replicas", "3", ranks=0)
    assert "replicas on cpu, cpu, cpu\n" in split
    assert len(accuracies(split)) == 1
    assert accuracies(split)[-1] > 0.7

    # The same batches from the same weights. Only the order of some sums differs, so that one
    # image in 360 may end on another side.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runpy.run_path(str(EXAMPLES / "data_parallel.py"))["run"](1, ["cpu"])
    torch.set_num_threads(threads)
    whole = capsys.readouterr().out
    assert accuracies(split)[-1] == pytest.approx(accuracies(whole)[-1], abs=1.5 / 360)
