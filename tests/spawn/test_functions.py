"""`fastddp.spawn` runs functions that are in no file: lambdas, and those of a notebook."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

import fastddp
from fastddp import extension
from tests.slow import slow_but_for
from tests.spawn.common import environment


class Batch(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_a_lambda_and_what_it_refers_to(fast_start):
    factor, shared = torch.tensor(3.0), torch.zeros(2)

    class Local(torch.nn.Linear):
        pass

    def body(rank: int, batch: Batch) -> Any:
        batch.second[rank] = batch.first * (rank + 1)  # shared, as it is for functions of a module
        return Local(1, 1), lambda: factor * rank

    assert fastddp.spawn(lambda rank: rank * int(factor), 2) == [0, 3]
    values = fastddp.spawn(body, 2, (Batch(factor, shared),))
    assert shared.tolist() == [3.0, 6.0]
    assert [type(module) for module, _ in values] == [Local, Local]
    assert [fn().item() for _, fn in values] == [0.0, 3.0]


NOT_IN_A_FILE = """
import torch, torch.distributed as dist
import fastddp

class Model(torch.nn.Linear):
    pass

class BadBatch(Exception):
    pass

def train(rank):
    for engine in ENGINES:
        model = fastddp.wrap(Model(1, 1, bias=False), engine=engine)
        model(torch.full((1, 1), 2.0 * (rank + 1))).backward()
        assert model.weight.grad.item() == 3.0
    return model.module, model.weight.grad

def fail(rank):
    raise BadBatch("at 7")

values = fastddp.spawn(train, 2)
assert [(type(model), grad.item()) for model, grad in values] == [(Model, 3.0)] * 2, values
try:
    fastddp.spawn(fail, 2)
except BadBatch as error:
    assert str(error).startswith("rank "), error
    assert str(error).endswith(" of 2: at 7"), error
    print("all is " + "right")
"""

WITHOUT_CLOUDPICKLE = """
import sys
sys.modules["cloudpickle"] = None
import fastddp
def body(rank): return rank
try:
    fastddp.spawn(body, 2)
except TypeError as error:
    print(error)
assert fastddp.spawn(print, 1, ("travels by name",)) == [None]
"""


def not_in_a_file() -> str:
    engines = ["native", "python"] if extension.load() else ["python"]
    return NOT_IN_A_FILE.replace("ENGINES", repr(engines))


@pytest.mark.parametrize("how", slow_but_for(["standard input"], ["-c", "standard input"]))
def test_a_function_in_no_file(how, tmp_path):
    source = not_in_a_file()
    arguments, given = (["-c", source], "") if how == "-c" else (["-"], source)
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "all is right\n"), done.stderr


def test_a_function_in_no_file_without_cloudpickle(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CLOUDPICKLE],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "in no file that the ranks could import" in done.stdout
    assert "pip install cloudpickle" in done.stdout
    assert "0 travels by name" in done.stdout


NOTEBOOK = """
import sys
import jupyter_client

source = sys.stdin.read()
manager = jupyter_client.KernelManager()
manager.kernel_spec.argv[0] = sys.executable
manager.start_kernel()
client = manager.client()
try:
    client.start_channels()
    client.wait_for_ready(timeout=40)
    # As cells: what one of them defines is used by the next.
    for cell in source.split("\\n\\n"):
        reply = client.execute_interactive(cell, timeout=50)
        assert reply["content"]["status"] == "ok"
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def test_in_a_notebook(tmp_path):
    """A real kernel."""
    pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        input=not_in_a_file(),
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is right\n" in done.stdout


def test_a_lambda_without_cloudpickle(monkeypatch, fast_start):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)  # as if not installed
    with pytest.raises(
        TypeError, match=r"use a function of a module and .* pip install cloudpickle"
    ):
        fastddp.spawn(lambda rank: rank)
