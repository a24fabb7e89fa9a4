"""Whole scripts: their ranks end with them, and their errors are readable."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.spawn.common import environment, is_alive, wait_until

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
import fastddp

def body(rank, folder):
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    Path(folder, f"ready-{rank}").touch()
    time.sleep(600)

if __name__ == "__main__":
    # Ctrl-C is ignored by what a shell starts in the background, and nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fastddp.spawn(body, 2, (sys.argv[1],), grace_s=2.0)
"""

FAILING = """
import os
import torch.distributed as dist
import fastddp

def body(rank):
    if rank == 1:
        raise ValueError("bad batch")
    dist.barrier()

if __name__ == "__main__":
    fastddp.spawn(body, 2)
"""

UNGUARDED = """
import fastddp

def body(rank):
    pass

fastddp.spawn(body, 2)
"""


@pytest.mark.parametrize("with_signal", ["SIGINT", "SIGINT to all", "SIGTERM", "SIGKILL"])
def test_the_ranks_end_with_the_parent(with_signal, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path],
        env=environment(temporary),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives it
    )
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
        number = getattr(signal, with_signal.split()[0])
        if with_signal.endswith("to all"):
            os.killpg(parent.pid, number)
        else:
            os.kill(parent.pid, number)
        _, errors = parent.communicate(timeout=20)
        assert wait_until(lambda: not any(map(is_alive, pids)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert parent.returncode == -number
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1  # the parent's own, and none of a rank
        assert errors.rstrip().endswith("KeyboardInterrupt")
    if number != signal.SIGKILL:
        assert list(temporary.iterdir()) == []


def test_what_a_failing_script_shows(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(FAILING)
    done = subprocess.run(
        [sys.executable, script], env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("Traceback") == 2  # the rank's, and where spawn was called
    assert 'raise ValueError("bad batch")\nValueError: bad batch\n' in done.stderr
    assert done.stderr.endswith("\nValueError: rank 1 of 2: bad batch\n")


def test_a_script_without_its_main_guard_is_told(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, script], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert re.search(r"rank [01] of 2 exited with code 1 before its function was called", last)
    assert "under 'if __name__ == \"__main__\":'" in last
