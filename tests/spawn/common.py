"""Processes and sockets of this process, for the tests of `fastddp.spawn`."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def children() -> set[str]:
    """What this process started, but for Python's own helpers of multiprocessing."""
    commands = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            # A zombie has ended, and keeps its entry until somebody asks how it ended.
            if int(parent) == os.getpid() and state != "Z":
                commands.add((folder / "cmdline").read_text().replace("\0", " "))
    helpers = ("resource_tracker", "forkserver")
    return {line for line in commands if not any(helper in line for helper in helpers)}


def open_sockets() -> set[str]:
    """The inodes of this process's sockets, of which the store is one."""
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {link for link in links if link.startswith("socket:")}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Any, seconds: float = 40.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alone(rank: int) -> tuple[int, int]:
    group = dist.group.WORLD
    assert group is not None
    return rank, group.size()


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
