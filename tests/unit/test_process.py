"""What the kernel says of real processes in each state."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastddp.watch import out_of_memory, process
from fastddp.watch.process import Kind, State

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")

DEADLINE_S = 60.0
SLEEPS = "import time; print(flush=True); time.sleep(600)"
RUNS = "print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def child(source: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script that prints a line when it is ready."""
    with subprocess.Popen([sys.executable, "-S", "-c", source], stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline()
            yield running
        finally:
            running.kill()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not {what}"
        time.sleep(0.01)


def born(pid: int) -> int:
    found = process.born(pid)
    assert found is not None
    return found


def wait_for(pid: int, kind: Kind) -> State:
    wait_until(lambda: process.state_of(pid, born(pid)).kind is kind, kind.value)
    return process.state_of(pid, born(pid))


def test_a_child_that_sleeps() -> None:
    with child(SLEEPS) as running:
        state = wait_for(running.pid, Kind.SLEEPING)
    expected = (
        f"sleeping in the kernel ({state.where})" if state.where else "sleeping in the kernel"
    )
    assert state.text == expected


def test_a_child_that_runs() -> None:
    with child(RUNS) as running:
        assert wait_for(running.pid, Kind.RUNNING).text == "running"


def test_a_child_that_is_stopped_and_continues() -> None:
    with child(SLEEPS) as running:
        os.kill(running.pid, signal.SIGSTOP)
        state = wait_for(running.pid, Kind.STOPPED)
        assert state.text == "stopped by a signal (SIGSTOP or Ctrl-Z)"
        os.kill(running.pid, signal.SIGCONT)
        wait_for(running.pid, Kind.SLEEPING)


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "dead, killed by SIGKILL"),
        ("os._exit(7)", "dead, with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", "dead, killed by signal 37"),
    ],
)
def test_a_child_that_nobody_has_waited_for(end: str, text: str) -> None:
    with child(f"import os, signal; print(flush=True); {end}") as running:
        assert wait_for(running.pid, Kind.ZOMBIE).text == text


def test_a_child_that_is_gone() -> None:
    with child(SLEEPS) as running:
        since = born(running.pid)
        running.kill()
        running.wait()
        assert process.state_of(running.pid, since).kind is Kind.GONE
        assert process.born(running.pid) is None


def test_a_pid_that_another_process_has_now() -> None:
    with child(SLEEPS) as running:
        assert process.state_of(running.pid, born(running.pid) - 1).kind is Kind.GONE


def test_a_name_with_parentheses_and_spaces() -> None:
    rename = "open('/proc/self/comm', 'w').write(') S (1 2')"
    with child(f"import time; {rename}; print(flush=True); time.sleep(600)") as running:
        wait_for(running.pid, Kind.SLEEPING)
        assert born(running.pid) >= born(os.getpid())


def test_the_time_of_a_tree_grows_with_a_grandchild_and_stays_when_it_has_ended() -> None:
    source = f"""
import subprocess, sys
work = subprocess.Popen([sys.executable, "-S", "-c", {RUNS!r}], stdout=subprocess.PIPE)
work.stdout.readline()
print(flush=True)
sys.stdin.readline()
work.kill()
work.wait()
print(flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdout.readline()
        before = process.cpu_s_of_tree(running.pid)
        wait_until(lambda: process.cpu_s_of_tree(running.pid) > before + 0.2, "busy")
        busy = process.cpu_s_of_tree(running.pid)
        running.stdin.write(b"\n")
        running.stdin.flush()
        running.stdout.readline()
        assert process.cpu_s_of_tree(running.pid) >= busy
        running.stdin.write(b"\n")


def test_the_time_of_a_child_that_sleeps_stands_still() -> None:
    with child(SLEEPS) as running:
        wait_for(running.pid, Kind.SLEEPING)
        before = process.cpu_s_of_tree(running.pid)
        time.sleep(0.2)
        assert process.cpu_s_of_tree(running.pid) == before


class Slow(Dataset[torch.Tensor]):
    """Items that take as long as the test."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(600)
        raise AssertionError


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_of_a_data_loader(method: str) -> None:
    loader = DataLoader(Slow(), num_workers=2, multiprocessing_context=method)
    assert process.loader_workers(os.getpid()) == []
    batches = iter(loader)

    def workers() -> list[tuple[int, State]]:
        return process.loader_workers(os.getpid())

    # torch's handler raises when a worker has died.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        wait_until(lambda: len(workers()) == 2, "two workers")
        pids = [pid for pid, _ in workers()]
        assert pids == sorted(worker.pid for worker in batches._workers)  # type: ignore[attr-defined]
        wait_until(lambda: all(s.kind is Kind.SLEEPING for _, s in workers()), "asleep")
        os.kill(pids[0], signal.SIGSTOP)
        wait_until(lambda: workers()[0][1].kind is Kind.STOPPED, "stopped")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: all(s.returncode == -9 for _, s in workers()), "dead")
        del batches
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("letter", "wchan", "text"),
    [
        ("D", "nfs_wait_bit_killable", f"{Kind.DISK.value} (nfs_wait_bit_killable)"),
        ("S", "ep_poll.constprop.0", "sleeping in the kernel (ep_poll)"),
        ("S", "0", "sleeping in the kernel"),
        ("t", "0", "stopped by a debugger"),
        ("X", "0", "gone"),
        ("?", "0", "in an unknown state"),
    ],
)
def test_states_as_the_kernel_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str, wchan: str, text: str
) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(f"7 (a) b) {letter} {'0 ' * 18}99 {'0 ' * 30}")
    (tmp_path / "7" / "wchan").write_text(wchan)
    monkeypatch.setattr(process, "_PROC", tmp_path)
    assert process.born(7) == 99
    assert process.state_of(7, 99).text == text


def test_who_catches_a_signal() -> None:
    catches = "import signal; signal.signal(signal.SIGRTMIN, print); "
    with child(catches + SLEEPS) as running:
        assert process.catches(running.pid, signal.SIGRTMIN)
        assert not process.catches(running.pid, signal.SIGRTMIN + 1)
        assert not process.catches(running.pid, signal.SIGRTMAX)
    with child("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + SLEEPS) as running:
        assert not process.catches(running.pid, signal.SIGHUP)
    assert not process.catches(2**30, signal.SIGHUP)


@pytest.mark.parametrize(
    ("mount", "group", "file"),
    [
        (
            "30 23 0:26 / {at} rw - cgroup2 cgroup2 rw",
            "0::/job/step",
            "job/step/memory.events",
        ),
        (
            "30 23 0:26 /docker/1 {at} rw - cgroup2 cgroup2 rw",
            "0::/docker/1",
            "memory.events",
        ),
        (
            "30 23 0:26 / {at} rw - cgroup cgroup rw,memory",
            "5:cpu,cpuacct:/job\n4:memory:/job\n0::/",
            "job/memory.oom_control",
        ),
        (  # lines without a source, and cut short
            "29 23 0:25 / /x rw - tmpfs  rw\n28 23 0:24 /\n30 23 0:26 / {at} rw - cgroup2  rw",
            "0::/job",
            "job/memory.events",
        ),
        (  # a container that sees neither where it is nor what is around it
            "30 23 0:26 /docker/1 {at} rw - cgroup cgroup rw,memory",
            "4:memory:/elsewhere",
            "memory.oom_control",
        ),
    ],
)
def test_counter_of_those_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str, group: str, file: str
) -> None:
    proc, at = tmp_path / "proc", tmp_path / "mount"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(mount.format(at=at) + "\n")
    (proc / "self" / "cgroup").write_text(group + "\n")
    (proc / "vmstat").write_text("oom_kill 9\n")
    monkeypatch.setattr(out_of_memory, "_PROC", proc)
    assert process.out_of_memory_kills() == 9
    (at / file).parent.mkdir(parents=True)
    (at / file).write_text("oom 5\noom_kill 3\noom_group_kill 0\n")
    assert process.out_of_memory_kills() == 3


def test_counter_of_this_machine() -> None:
    count = process.out_of_memory_kills()
    assert count is None or count >= 0


def test_nothing_is_known_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_PROC", tmp_path / "none")
    monkeypatch.setattr(out_of_memory, "_PROC", tmp_path / "none")
    pid = os.getpid()
    assert process.born(pid) is None
    assert process.state_of(pid, 1).text == "in an unknown state"
    assert process.cpu_s_of_tree(pid) == 0.0
    assert process.loader_workers(pid) == []
    assert process.out_of_memory_kills() is None
    assert not process.catches(pid, signal.SIGINT)
