"""The first rank that fails is blamed, whatever the others do."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import fastddp
from fastddp.comm.spawn import rank as in_the_rank
from fastddp.comm.spawn.mailbox import post


class UnpicklableError(RuntimeError):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _fail(rank: int, how: str) -> None:
    """Rank 1 fails; the others wait for it in a collective, or do not answer to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "others hang" else signal.SIG_DFL)
    dist.barrier()
    if rank != 1:
        if how == "others hang":
            time.sleep(600)
        dist.barrier()
        raise AssertionError("unreachable")
    if how == "raise":
        raise FileNotFoundError(2, "No such file", "data.bin")
    if how == "raise and clean up":
        try:
            raise ValueError("bad batch")
        finally:
            dist.destroy_process_group()
            time.sleep(0.4)  # the others have noticed, and reported, before this rank reports
    if how == "assert":
        raise AssertionError
    if how == "unpicklable":
        raise UnpicklableError(1, 2)
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sys.exit":
        sys.exit(7)
    if how == "os._exit":
        os._exit(0)
    raise ValueError("bad batch")


@pytest.mark.parametrize(
    ("how", "error", "own", "text"),
    [
        ("raise", FileNotFoundError, "No such file", "rank 1 of 3 raised FileNotFoundError"),
        ("raise and clean up", ValueError, "rank 1 of 3: bad batch", "rank 1 of 3 raised Value"),
        ("assert", AssertionError, "^rank 1 of 3$", "rank 1 of 3 raised AssertionError"),
        ("unpicklable", fastddp.RankError, "raised UnpicklableError", "1 and 2"),
        ("SIGKILL", fastddp.RankError, "rank 1 of 3 was killed by SIGKILL", ""),
        ("sys.exit", fastddp.RankError, r"rank 1 of 3 called sys.exit\(7\)", "sys.exit"),
        ("os._exit", fastddp.RankError, "rank 1 of 3 exited with code 0", ""),
        ("others hang", ValueError, "rank 1 of 3: bad batch", "the others: rank 0 was running"),
    ],
)
def test_the_first_failure_is_raised(how, error, own, text, fast_start):
    with pytest.raises(error, match=own) as caught:
        fastddp.spawn(_fail, 3, (how,), grace_s=1.0)
    cause = caught.value if error is fastddp.RankError else caught.value.__cause__
    assert isinstance(cause, fastddp.RankError)
    assert cause.rank == 1
    assert cause.exit_code == {"SIGKILL": -9, "sys.exit": 7, "os._exit": 0}.get(how)
    assert text in str(cause)
    if how not in ("SIGKILL", "os._exit"):
        assert re.search(r"test_failures.py\", line \d+, in _fail", str(cause))
    if how == "raise":
        assert (caught.value.errno, caught.value.filename) == (2, "data.bin")


def test_a_rank_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(fastddp.RankError("text", 3, -9)))
    assert (str(error), error.rank, error.exit_code) == ("text", 3, -9)


def _die_while_reporting(rank: int, folder: str) -> bytes:
    """Rank 1 is killed when half of its report is sent; a process that it forked lives on."""
    if rank == 1:
        child = os.fork()
        if child == 0:
            time.sleep(600)
        Path(folder, "child").write_text(str(child))

        def half(line: socket.socket, message: bytes) -> None:
            whole = bytearray()
            post(SimpleNamespace(sendall=whole.extend), message)  # type: ignore[arg-type]
            line.sendall(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        in_the_rank.post = half  # type: ignore[assignment]
    return bytes(10_000_000)


def test_a_rank_that_is_killed_while_it_reports(fast_start, tmp_path):
    try:
        with pytest.raises(
            fastddp.RankError, match="rank 1 of 2 was killed by SIGKILL while it se"
        ):
            fastddp.spawn(_die_while_reporting, 2, (str(tmp_path),), grace_s=1.0)
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def _stop_answering(rank: int) -> None:
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def test_a_collective_times_out(fast_start):
    with pytest.raises(RuntimeError) as caught:
        fastddp.spawn(_stop_answering, 2, timeout_s=2.0, grace_s=1.0)
    assert "rank 1 of 2 raised" in str(caught.value.__cause__)
    assert "rank 0 was running" in str(caught.value.__cause__)


def _abort_at_exit(rank: int) -> None:
    import atexit

    if rank == 1:
        atexit.register(os._exit, 5)


def test_an_exit_that_fails_after_the_function():
    with pytest.raises(fastddp.RankError, match="exited with code 5 after its function had"):
        fastddp.spawn(_abort_at_exit, 2)
