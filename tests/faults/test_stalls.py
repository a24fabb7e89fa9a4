"""Ranks that wait for one that does not come: what is said of it, and what is raised."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastddp
from fastddp.comm import shm
from fastddp.watch import board
from tests.conftest import require_native
from tests.ranks import run_ranks, scratch_folder

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
    return [line for line in lines if line.startswith(("fastddp: ", "  "))]


class Numbers(Dataset[torch.Tensor]):
    """Inputs, one of which may be slow."""

    def __init__(self, is_slow: bool) -> None:
        self.is_slow = is_slow

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.is_slow and index == SLOW_STEP:
            time.sleep(PAUSE_S)
        return torch.ones(4)


def train(before_step: Callable[[int], object] = int, slow_input: bool = False) -> None:
    model = fastddp.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, x in enumerate(DataLoader(Numbers(slow_input), batch_size=1)):
        before_step(step)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    dist.barrier()
    time.sleep(1.0)  # several looks


# ---- slow input ----------------------------------------------------------------------------------


def _slow_input(rank: int, world_size: int) -> None:
    train(slow_input=rank == 1)


def test_slow_input_is_told_and_so_is_its_end(
    transport: str, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_slow_input, 2, env=environment(transport, FASTDDP_ENGINE=engine))
    lines = told(capsys)
    step = SLOW_STEP + 1
    assert re.match(
        rf"fastddp: rank 0 has waited for 1\.\d s in the all-reduce of bucket 1 of model"
        rf" 'Sequential' .*\(.*weight.*\), step {step}, at {line_of(train, 'backward()')}",
        lines[0],
    ), lines
    assert re.match(
        rf"  rank 1 has not come: .*, at {line_of(Numbers.__getitem__, 'time.sleep')},"
        rf" called from"
        rf" {line_of(train, 'for step')}",
        lines[1],
    ), lines
    assert lines[2].startswith("  likely: the input of rank 1 is slow; next: "), lines
    assert re.match(
        r"fastddp: the wait of rank 0 is over after [3456]\.\d s; rank 1 came last", lines[-1]
    ), lines


def _slow_input_on_another_host(rank: int, world_size: int) -> None:
    os.environ["FASTDDP_HOST_ID"] = str(rank)
    train(slow_input=rank == 1)


def test_a_rank_of_another_host_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(_slow_input_on_another_host, 2, env=environment("gloo"))
    lines = told(capsys)
    answer = (
        r"  rank 1 has not come: it is on another host; sleeping in the kernel \(.*\), at"
        rf" {line_of(Numbers.__getitem__, 'time.sleep')}, called from .*; {SLOW_STEP} steps done"
    )
    assert any(re.fullmatch(answer, line) for line in lines), lines
    assert "the wait of rank 0 is over" in lines[-1]


# ---- stopped -------------------------------------------------------------------------------------


def _stopped(rank: int, world_size: int) -> None:
    pids: list[Any] = [None, None]
    dist.all_gather_object(pids, os.getpid())

    def before_step(step: int) -> None:
        if step == SLOW_STEP and rank == 0:
            os.kill(pids[1], signal.SIGSTOP)
            threading.Timer(PAUSE_S, os.kill, (pids[1], signal.SIGCONT)).start()

    train(before_step)


def test_a_stopped_rank_is_told(transport: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(_stopped, 2, env=environment(transport))
    lines = told(capsys)
    assert re.match(r"fastddp: rank 0 has waited for 1\.\d s in ", lines[0]), lines
    assert lines[1].startswith("  rank 1 has not come: stopped by a signal"), lines
    assert lines[2].startswith("  likely: rank 1 was stopped from outside; next: "), lines
    assert re.match(r"fastddp: the wait of rank 0 is over after .*; rank 1 came last", lines[-1]), (
        lines
    )


# ---- different collectives -----------------------------------------------------------------------


def _leaves_early(rank: int, world_size: int) -> list[str]:
    """Rank 1 has fewer batches, and goes on to a barrier of the script's own."""
    model = fastddp.wrap(nn.Linear(4, 2))
    said = scratch_folder() / "what rank 0 raised"
    try:
        for step in range(STEPS):
            if rank == 1 and step == SLOW_STEP:
                break
            model(torch.ones(1, 4)).sum().backward()
        dist.barrier()
    except RuntimeError as error:
        if rank == 0:
            said.write_text(str(error))
            os._exit(1)  # as a script does that does not catch it
        return [said.read_text(), str(error)]
    return []


def test_a_deadlock_is_an_error(transport: str, engine: str) -> None:
    env = environment(transport, FASTDDP_ENGINE=engine)
    _, errors = run_ranks(_leaves_early, 2, env=env, expect_dead=[0])
    both = (
        rf"rank 0 waits in the all-reduce of bucket 1 of .*step {SLOW_STEP + 1}, at"
        rf" {line_of(_leaves_early, 'backward()')}; rank 1 waits in the script's own barrier on"
        rf" group '0', at {line_of(_leaves_early, 'dist.barrier')}\. Likely rank 1 left the"
        rf" training loop after step {SLOW_STEP}: it has fewer batches; next: "
    )
    assert re.search(both, errors[0]), errors
    assert len(errors) == 2, "the barrier of rank 1 ends when rank 0 does"


def _crosses_groups(rank: int, world_size: int) -> str:
    groups = [dist.new_group(), dist.new_group()]
    models = [fastddp.wrap(nn.Linear(4, 2), process_group=group) for group in groups]
    for model in models:
        model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(dist.DistBackendError) as caught:
        models[rank](torch.ones(1, 4)).sum().backward()
    time.sleep(1.0)  # or the other rank might fail because this one's process ends
    return str(caught.value)


def test_crossed_groups_are_an_error_on_all_ranks(transport: str, engine: str) -> None:
    env = environment(transport, FASTDDP_ENGINE=engine)
    place = line_of(_crosses_groups, "models[rank]")
    for error in run_ranks(_crosses_groups, 2, env=env):
        assert re.search(
            r"none of them can ever go on: rank 0 waits in the all-reduce of bucket 1 of model"
            rf" 'Linear' \(number 1 .* on group '\d+', step 2, at {place}; rank 1 waits in the"
            rf" all-reduce of bucket 1 of model 'Linear' \(number 1 .* on group '\d+', step 2, at"
            rf" {place}\. Likely the ranks run backwards of different models; next: ",
            error,
        ), error


def test_a_deadlock_can_be_left_to_the_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    env = environment("gloo", FASTDDP_STALL="warn")
    errors = run_ranks(_waits_apart, 2, env=env)
    assert not any("none of them can ever go on" in error for error in errors), errors
    assert "likely: " in "\n".join(told(capsys))


def _waits_apart(rank: int, world_size: int) -> str:
    groups = [dist.new_group(timeout=timedelta(seconds=4)) for _ in range(2)]
    models = [fastddp.wrap(nn.Linear(4, 2), process_group=group) for group in groups]
    with pytest.raises(dist.DistBackendError) as caught:
        models[rank](torch.ones(1, 4)).sum().backward()
    return str(caught.value)


# ---- in C code, with Python's lock ---------------------------------------------------------------


def _holds_the_lock(rank: int, world_size: int) -> None:
    def before_step(step: int) -> None:
        if step == SLOW_STEP and rank == 1:
            reader, writer = os.pipe()
            with subprocess.Popen(["sleep", "8"], pass_fds=[writer]):
                os.close(writer)
                # Until the end of the file. A sleep would end when the stack is asked for.
                ctypes.PyDLL(None).read(reader, ctypes.create_string_buffer(1), 1)

    train(before_step)


def test_a_rank_that_holds_pythons_lock_is_told(
    transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_holds_the_lock, 2, env=environment(transport, FASTDDP_STALL_SECONDS="3.2"))
    lines = told(capsys)
    assert re.match(
        r"  rank 1 has not come: sleeping .*, in a call that holds Python's lock \(the GIL\), at"
        rf" {line_of(_holds_the_lock, 'PyDLL').replace('_holds_the_lock', 'before_step')}",
        lines[1],
    ), lines


# ---- what is not a stall -------------------------------------------------------------------------


def _computes(rank: int, world_size: int) -> None:
    def before_step(step: int) -> None:
        end = time.monotonic() + PAUSE_S
        while step == SLOW_STEP and rank == 1 and time.monotonic() < end:
            pass

    train(before_step)


def test_a_rank_that_computes_is_not_told(
    transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_computes, 2, env=environment(transport))
    assert told(capsys) == []


def _asks_a_person(rank: int, world_size: int) -> None:
    reader, writer = os.pipe()
    sys.stdin = os.fdopen(reader)

    def before_step(step: int) -> None:
        if step == SLOW_STEP and rank == 1:
            threading.Timer(3.0, os.write, (writer, b"go on\n")).start()
            assert input() == "go on"

    train(before_step)


def test_a_rank_that_waits_for_a_person_is_not_told(
    transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_asks_a_person, 2, env=environment(transport))
    assert told(capsys) == []


# ---- healthy -------------------------------------------------------------------------------------


def _healthy(rank: int, world_size: int) -> None:
    model = fastddp.wrap(nn.Linear(4, 2))
    for step in range(40):
        time.sleep(0.02 if step % 2 == rank else 0.0)
        model(torch.ones(1, 4)).sum().backward()
    dist.barrier()


def test_a_healthy_run_says_nothing(
    transport: str, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Longer than a busy machine keeps a rank from running.
    env = environment(transport, FASTDDP_ENGINE=engine, FASTDDP_STALL_SECONDS="8")
    run_ranks(_healthy, 2, env=env)
    assert told(capsys) == []


def _unwatched(rank: int, world_size: int) -> list[str]:
    _healthy(rank, world_size)
    assert board.own() is None
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastddp")]


def test_nothing_looks_where_that_is_turned_off(transport: str) -> None:
    env = environment(transport, FASTDDP_STALL="off")
    for threads in run_ranks(_unwatched, 2, env=env):
        assert "fastddp watch" not in threads
        assert "fastddp store" not in threads
