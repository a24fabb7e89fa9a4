"""`fastddp.spawn`: what a rank finds, what comes back, and who is blamed when ranks fail."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import fastddp
from fastddp import extension
from fastddp.comm.spawn import parent
from fastddp.comm.spawn.mailbox import post
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.ranks import LAUNCHER_VARIABLES, PRELOAD
from tests.slow import slow_but_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No child, no port, no variable of a launcher is left in this process."""
    for name in (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    sockets = open_sockets()
    yield
    assert not [name for name in LAUNCHER_VARIABLES if name in os.environ]
    assert "OMP_NUM_THREADS" not in os.environ
    assert children() == set()
    assert open_sockets() == sockets


@pytest.fixture
def fast_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks the ranks from a server that has imported torch: seconds less a test."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    monkeypatch.setattr(parent, "_START_METHOD", "forkserver")


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


# --- what a rank finds, and what comes back -------------------------------------------------------


def _train(rank: int, factor: float) -> dict[str, Any]:
    model = fastddp.wrap(Ladder())
    world_size = dist.get_world_size()
    for step in range(3):
        model.zero_grad()
        model(factor * ladder_x(rank, step, world_size)).backward()
        assert_ladder(model.module, factor * mean_x(step, world_size), step)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {
        "variables": [int(os.environ[name]) for name in names],
        "group": (dist.get_rank(), dist.get_world_size()),
        "threads": (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]),
        "weight": model.a.detach(),
    }


def test_training_and_its_values_by_rank():
    """Under wrap, with the default number of ranks."""
    values = fastddp.spawn(_train, args=(2.0,))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [value["variables"] for value in values] == [[0, 0, 2, 2], [1, 1, 2, 2]]
    assert [value["group"] for value in values] == [(0, 2), (1, 2)]
    assert [value["threads"] for value in values] == [(threads, str(threads))] * 2
    assert torch.equal(values[0]["weight"], Ladder().a)


def _odd_values(rank: int, shared: torch.Tensor, folder: str) -> Any:
    shared[rank] = rank + 1  # shared memory, as with torch's spawn
    if rank == 0:
        dist.destroy_process_group()  # a script that does its own clean-up
        return threading.Lock()
    dist.destroy_process_group()
    Path(folder, "variables").write_text(os.environ["OMP_NUM_THREADS"])
    sys.exit(0)


def test_what_cannot_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shared = torch.zeros(2)
    with pytest.warns(RuntimeWarning, match="rank 0 of 2 returned cannot be pickled.*None is in"):
        values = fastddp.spawn(_odd_values, nprocs=2, args=(shared, str(tmp_path)))
    assert values == [None, None]
    assert shared.tolist() == [1.0, 2.0]
    assert (tmp_path / "variables").read_text() == "3"
    monkeypatch.undo()  # before the fixture looks


def _alone(rank: int) -> tuple[int, int]:
    group = dist.group.WORLD
    assert group is not None
    return rank, group.size()


def test_one_rank():
    assert fastddp.spawn(_alone, 1) == [(0, 1)]


def test_the_store_listens_on_loopback_alone(fast_start):
    assert fastddp.spawn(_listeners, 2) == [["0100007F"]] * 2  # 127.0.0.1


def _listeners(rank: int) -> list[str]:
    """The addresses at which somebody listens on the store's port: nobody else can be there."""
    port = int(os.environ["MASTER_PORT"])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, number = line.split()[1].split(":")
            if int(number, 16) == port and line.split()[3] == "0A":  # TCP_LISTEN
                found.append(address)
    return found


# --- functions that are in no file ----------------------------------------------------------------


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


# --- a rank fails ---------------------------------------------------------------------------------


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
        assert re.search(r"test_spawn.py\", line \d+, in _fail", str(cause))
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

        parent.post = half  # type: ignore[attr-defined]
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


# --- errors of the call ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fn": 3}, TypeError, "expected a function, got int"),
        ({"args": (threading.Lock(),)}, TypeError, "by pickle; .*cannot pickle '_thread.lock'"),
        ({"args": 3}, TypeError, r"args=3 is no tuple; for one argument, \(argument,\)"),
        ({"nprocs": (1,)}, TypeError, r"nprocs=\(1,\) is no number. The order is spawn\(fn, nproc"),
        ({"nprocs": 0}, ValueError, "nprocs=0, less than 1"),
        ({"timeout_s": 0.0}, ValueError, "timeout_s=0.0 is no time"),
    ],
)
def test_a_call_that_cannot_work(options, error, text, fast_start):
    with pytest.raises(error, match=text):
        fastddp.spawn(**{"fn": _alone, **options})


def test_a_lambda_without_cloudpickle(monkeypatch, fast_start):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)  # as if not installed
    with pytest.raises(
        TypeError, match=r"use a function of a module and .* pip install cloudpickle"
    ):
        fastddp.spawn(lambda rank: rank)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"nprocs=2, but there are 1 GPU.*CUDA_VISIBLE_DEVICES=''"):
        fastddp.spawn(_alone, 2)
    monkeypatch.undo()


# --- whole scripts --------------------------------------------------------------------------------

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


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}


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
