"""What a test leaves running: found, ended and reported before the next test begins.

A process belongs to this test run if this run's name is in the environment that the process was
started with. The name stays there when a parent ends before its child, so that orphans are found
too, and the processes of other test runs and of other workers of pytest-xdist are left alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import time
from pathlib import Path

GRACE_S = 5.0
"""How long a process may take to end on its own after its test, on a machine that is busy."""

_PROC = Path("/proc")


def name_this_run() -> None:
    """Put this run's name where every process that is started from now on inherits it."""
    os.environ[_name_of_run()] = "1"


def running() -> set[int]:
    """Return the process ids of this run's processes, other than what Python keeps for itself."""
    found = set()
    name = f"{_name_of_run()}=1".encode()
    for folder in _PROC.glob("[0-9]*"):
        # A process that ends while it is looked at, or that belongs to another user.
        with contextlib.suppress(OSError):
            if name in (folder / "environ").read_bytes().split(b"\0") and not _is_zombie(folder):
                found.add(int(folder.name))
    return found - _kept_by_python() - {os.getpid()}


def end(before: set[int]) -> list[str]:
    """End the processes of this run that were not there before; return their command lines.

    Processes that end within a moment are not mentioned: a test need not wait for each of them.
    """
    deadline = time.monotonic() + GRACE_S
    while (left := running() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    commands = [f"process {pid}: {_command(pid)}" for pid in sorted(left)]
    # What is killed may be starting another one.
    while left := running() - before:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        if time.monotonic() > deadline + GRACE_S:
            break
    multiprocessing.active_children()  # takes the exit statuses of those that were ended
    return commands


def _name_of_run() -> str:
    return f"TEST_RUN_{os.getpid()}"


def _kept_by_python() -> set[int | None]:
    """Return the helpers that multiprocessing starts once and uses until this process ends."""
    return {
        multiprocessing.forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        multiprocessing.resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
    }


def _is_zombie(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _command(pid: int) -> str:
    try:
        return (_PROC / f"{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "has ended"
