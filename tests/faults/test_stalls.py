"""Ranks that wait for one that does not come: what is said of it, and what is raised."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastddp
from fastddp.comm import shm
from tests.conftest import require_native
from tests.ranks import run_ranks

SECONDS = {"FASTDDP_STALL_SECONDS": "1"}
TRANSPORTS = ["shm", "gloo"]
STEPS, SLOW_STEP = 6, 3
PAUSE_S = 4.0


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "shm":
        require_native()
        if (reason := shm.why_not()) is not None:
            pytest.skip(reason)
    return str(request.param)


def environment(transport: str, **more: str) -> dict[str, str]:
    return SECONDS | {"FASTDDP_SHM": str(int(transport == "shm"))} | more


def line_of(function: Callable[..., Any], text: str) -> str:
    """Returns where a text stands in a function, as verdicts name the place."""
    lines, first = inspect.getsourcelines(function)
    (index,) = (i for i, line in enumerate(lines) if text in line)
    return rf"\S*test_stalls.py:{first + index} in {function.__name__}"


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the lines that the ranks have printed, without those that are not ours."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(("fastddp: rank", "  "))]


class Numbers(Dataset[torch.Tensor]):
    """Inputs, one of which is slow on rank 1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.rank == 1 and index == SLOW_STEP:
            time.sleep(PAUSE_S)
        return torch.ones(4)


def train(rank: int, before_step: Callable[[int], None] = lambda step: None) -> None:
    model = fastddp.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, x in enumerate(DataLoader(Numbers(rank), batch_size=1)):
        before_step(step)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    dist.barrier()


# ---- slow input ----------------------------------------------------------------------------------


def _slow_input(rank: int, world_size: int) -> None:
    train(rank)


def test_slow_input_is_told_and_so_is_its_end(
    transport: str, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    env = environment(transport, FASTDDP_ENGINE=engine)
    run_ranks(_slow_input, 2, env=env)
    lines = told(capsys)
    step = SLOW_STEP + 1
    assert re.match(
        rf"fastddp: rank 0 has waited for 1\.\d s in the all-reduce of bucket 0 of model"
        rf" 'Sequential' .*\(.*weight.*\), step {step}, at {line_of(train, 'backward()')}",
        lines[0],
    ), lines
    assert re.match(
        rf"  rank 1 has not come: .*, at {line_of(Numbers.__getitem__, 'time.sleep')},"
        rf" called from \S*test_stalls.py:\d+ in ",
        lines[1],
    ), lines
    assert lines[2].startswith("  likely: the input of rank 1 is slow; next: "), lines
    assert re.match(
        r"fastddp: rank 0 goes on after [345]\.\d s of waiting; rank 1 came last", lines[-1]
    ), lines
