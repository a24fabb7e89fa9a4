"""A training script in which one rank goes wrong in a chosen way, for the campaign of stalls.

A rank ends as a script does: what it has not caught ends its process with exit code 1.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastddp
from tests.ranks import scratch_folder

STEPS = 24
BATCH = 2
PAUSE_S = 3.5
"""How long a rank that goes on after a while keeps the others waiting."""


class Fault(Enum):
    """What goes wrong on one rank, the victim."""

    SLOW_INPUT = "sleep in the data set"
    SLOW_WORKER = "sleep in a data loader worker"
    SLEEP = "sleep in the script"
    SLOW_RANK = "sleep in several steps"
    SLOW_SAVE = "sleep before a barrier of all"
    HOLDS_LOCK = "C code that holds Python's lock"
    STOP = "SIGSTOP"
    LATE_START = "sleep before the model is wrapped"
    DIES_EARLY = "SIGKILL before the model is wrapped"
    KILL = "SIGKILL"
    INTERRUPT = "SIGINT"
    EXCEPTION = "exception"
    DISK_FULL = "disk full at a checkpoint"
    LEAVES = "leaves the loop and ends"
    LEAVES_TO_BARRIER = "leaves the loop to a barrier"
    LEAVES_TO_ALL_REDUCE = "leaves the loop to an all-reduce"
    LEAVES_TO_GATHER = "leaves the loop to all_gather_object"
    EXTRA = "a collective too many"
    SKIPS = "a step that is left out"
    NO_BACKWARD = "a forward without a backward"
    BRANCH = "two models in another order"
    NONE = "nothing"
    COMPUTES = "computes for long in a step"
    COMPUTES_FIRST = "computes for long before the first step"
    COMPUTES_EARLY = "computes for long before the model is wrapped"
    EVALUATES = "evaluates on one rank before a barrier"
    SHORT_PAUSE = "sleeps for less than the threshold in each step"
    FREEZE = "SIGSTOP of all ranks"
    PERSON = "waits for somebody to type"
    DEBUGGER = "is at a prompt of pdb"


@dataclass(frozen=True)
class Run:
    """One run of the script."""

    seed: int
    fault: Fault
    transport: str
    engine: str
    hosts: str
    """A letter for each rank, which names its host."""
    victim: int
    step: int
    buffers: bool
    """Whether the model has buffers, which are broadcast before every forward."""
    seconds: float
    """FASTDDP_STALL_SECONDS."""
    delay_s: float
    """From the beginning of the step to the signal, where there is one."""

    @property
    def world_size(self) -> int:
        return len(self.hosts)


class Numbers(Dataset[torch.Tensor]):
    """Inputs, some of which may be slow."""

    def __init__(self, slow: range) -> None:
        self.slow = slow

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.slow:
            time.sleep(PAUSE_S)
        return torch.full((8,), float(index))


def be_rank(rank: int, world_size: int, run: Run) -> None:
    """Runs the script, writes down how it has ended, and ends the process."""
    tempfile.tempdir = None  # the fork server may have found another
    folder = scratch_folder()
    if run.transport == "hosts":
        os.environ["FASTDDP_HOST_ID"] = run.hosts[rank]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background
    error = None
    try:
        script(rank, run, folder)
    except BaseException as caught:
        error = caught
    seen = {
        "error": f"{type(error).__name__}: {error}" if error is not None else "",
        "at": time.monotonic(),
    }
    keep = Path(os.environ["CAMPAIGN_FOLDER"], f"outcome-{rank}")
    keep.write_text(json.dumps(seen))
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(1 if error is not None else 0)


def begin_fault(rank: int) -> None:
    """Says that the fault comes now, and in which process."""
    at = Path(os.environ["CAMPAIGN_FOLDER"], "fault")
    at.with_suffix(".new").write_text(json.dumps({"at": time.monotonic(), "pid": os.getpid()}))
    at.with_suffix(".new").rename(at)


def script(rank: int, run: Run, folder: Path) -> None:
    """Trains, saves, and lets one rank go wrong."""
    fault = run.fault
    is_victim = rank == run.victim
    if is_victim and fault is Fault.LATE_START:
        begin_fault(rank)
        time.sleep(PAUSE_S + 2 * run.seconds)
    if is_victim and fault is Fault.COMPUTES_EARLY:
        compute(2 * run.seconds)
    if is_victim and fault is Fault.DIES_EARLY:
        begin_fault(rank)
        os.kill(os.getpid(), signal.SIGKILL)
    slow = range(0)
    if is_victim and fault in (Fault.SLOW_INPUT, Fault.SLOW_WORKER):
        slow = range(run.step * BATCH, run.step * BATCH + 1)
    loader = DataLoader(
        Numbers(slow),
        batch_size=BATCH,
        num_workers=1 if fault is Fault.SLOW_WORKER else 0,
        multiprocessing_context="fork" if fault is Fault.SLOW_WORKER else None,
    )
    model = fastddp.wrap(net(run.buffers), engine=run.engine, bucket_cap_mb=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if fault is Fault.BRANCH:
        two_models(rank, run)
        return
    if is_victim and fault is Fault.COMPUTES_FIRST:
        compute()
    for step, x in enumerate(loader):
        if is_victim and step == run.step:
            begin_fault(rank)
            if fault in (
                Fault.LEAVES,
                Fault.LEAVES_TO_BARRIER,
                Fault.LEAVES_TO_ALL_REDUCE,
                Fault.LEAVES_TO_GATHER,
            ):
                break
            if fault is Fault.SKIPS:
                continue
            goes_wrong(run)
            if fault is Fault.NO_BACKWARD:
                model(x)
                continue
        if is_victim and fault is Fault.SLOW_RANK and run.step <= step < run.step + 2:
            time.sleep(2 * run.seconds)
        if is_victim and fault is Fault.SHORT_PAUSE:
            time.sleep(0.4 * run.seconds / 2)
        time.sleep(0.01)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    if fault is Fault.LEAVES and is_victim:
        if run.seed % 2:
            dist.destroy_process_group()
        return
    if fault is Fault.LEAVES_TO_ALL_REDUCE:
        dist.all_reduce(torch.ones(1))
    if fault is Fault.LEAVES_TO_GATHER:
        dist.all_gather_object([None] * run.world_size, rank)
    if is_victim and fault is Fault.DISK_FULL:
        begin_fault(rank)
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.pt")
    if is_victim and fault is Fault.SLOW_SAVE:
        begin_fault(rank)
        time.sleep(PAUSE_S)
    if is_victim and fault is Fault.EVALUATES:
        compute()
    dist.barrier()
    time.sleep(1.5 * run.seconds)  # several looks


def goes_wrong(run: Run) -> None:
    """Does what is wrong in a step."""
    fault = run.fault
    if fault is Fault.SLEEP:
        time.sleep(PAUSE_S)
    elif fault is Fault.HOLDS_LOCK:
        # A rank of another host cannot answer then, and is told of after three times the seconds.
        factor = 3 if run.transport == "hosts" else 1
        ctypes.PyDLL(None).sleep(int(factor * run.seconds + PAUSE_S))
    elif fault is Fault.EXCEPTION:
        raise ValueError("a batch without labels")
    elif fault is Fault.EXTRA:
        dist.barrier() if run.seed % 2 else dist.all_reduce(torch.ones(2))
    elif fault is Fault.COMPUTES:
        compute()
    elif fault in (Fault.PERSON, Fault.DEBUGGER):
        wait_for_a_person(fault is Fault.DEBUGGER)


def two_models(rank: int, run: Run) -> None:
    """Trains two models, which the victim once takes the other way round."""
    groups = [dist.new_group(timeout=timedelta(seconds=30)) for _ in range(2)]
    models = [
        fastddp.wrap(net(run.buffers), engine=run.engine, process_group=group) for group in groups
    ]
    for step in range(STEPS):
        order = [0, 1]
        if step == run.step and rank == run.victim:
            begin_fault(rank)
            order = [1, 0]
        for which in order:
            models[which](torch.ones(BATCH, 8)).sum().backward()


def net(buffers: bool) -> nn.Module:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(8) if buffers else nn.Identity()
    return nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), nn.Linear(8, 1))


def compute(seconds: float = PAUSE_S) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def wait_for_a_person(with_debugger: bool) -> None:
    import pdb
    import threading

    reader, writer = os.pipe()
    sys.stdin = os.fdopen(reader)
    threading.Timer(PAUSE_S, os.write, (writer, b"c\n")).start()
    if with_debugger:
        pdb.Pdb(nosigint=True, stdout=open(os.devnull, "w")).set_trace()  # noqa: SIM115
    else:
        input()


def outcome(folder: Path, rank: int) -> dict[str, Any] | None:
    """Returns how a rank has ended, if it could say so."""
    path = folder / f"outcome-{rank}"
    return json.loads(path.read_text()) if path.exists() else None
