"""What the kernel says of a process of this host: its state, its children, the time it has used.

Everything is read from ``/proc`` (see proc(5)), which answers even if the process is stopped or
dead. Where there is no ``/proc`` nothing is known, and nothing raises. All functions work in any
thread, and none is collective.
"""

from __future__ import annotations

import os
import signal as signals
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fastddp.watch.out_of_memory import out_of_memory_kills as out_of_memory_kills

_PROC = Path("/proc")
_WORKER_NAME = "pt_data_worker"
"""What torch's data loader calls the main thread of each of its workers."""


class Kind(Enum):
    """What the kernel says that a process's main thread does."""

    RUNNING = "running"
    SLEEPING = "sleeping in the kernel"
    DISK = "waiting in the kernel for a disk, a network file or a driver, not to be interrupted"
    STOPPED = "stopped by a signal (SIGSTOP or Ctrl-Z)"
    TRACED = "stopped by a debugger"
    ZOMBIE = "dead"
    """It has ended, and its parent has not asked how."""
    GONE = "gone"
    """No process has this pid, or a later one has it."""
    UNKNOWN = "in an unknown state"


@dataclass(frozen=True)
class State:
    """What a process does."""

    kind: Kind
    where: str = ""
    """The kernel's function that it sleeps in; empty where the kernel does not tell."""
    returncode: int | None = None
    """Of a zombie, if the kernel tells: its exit code, or a signal's number, negative."""

    @property
    def runs(self) -> bool:
        """Whether the process can do something: it is neither stopped nor dead."""
        return self.kind in (Kind.RUNNING, Kind.SLEEPING, Kind.DISK)

    @property
    def text(self) -> str:
        """Describes the state in words that follow "it is"."""
        if self.returncode is None:
            return f"{self.kind.value} ({self.where})" if self.where else self.kind.value
        if self.returncode < 0:
            return f"{self.kind.value}, killed by {_name_of(-self.returncode)}"
        return f"{self.kind.value}, with exit code {self.returncode}"


_KINDS = {
    "R": Kind.RUNNING,
    "S": Kind.SLEEPING,
    "I": Kind.SLEEPING,
    "D": Kind.DISK,
    "T": Kind.STOPPED,
    "t": Kind.TRACED,
    "Z": Kind.ZOMBIE,
    "X": Kind.GONE,
}


def born(pid: int) -> int | None:
    """Returns when a process began, which tells it from a later one with the same pid.

    Args:
        pid: the process, of this process's pid namespace.

    Returns:
        Clock ticks of the kernel since the boot; None if there is no such process.
    """
    stat = _Stat.read(pid)
    return stat.born if stat else None


def state_of(pid: int, born: int) -> State:
    """Returns what a process does.

    Args:
        pid: the process, of this process's pid namespace.
        born: what :func:`born` has returned for it.
    """
    stat = _Stat.read(pid)
    if stat is None:
        return State(Kind.GONE if _Stat.read(os.getpid()) else Kind.UNKNOWN)
    if stat.born != born:
        return State(Kind.GONE)
    return stat.state()


def cpu_s_of_tree(pid: int) -> float:
    """Returns the CPU seconds of a process and of all its descendants, living or ended.

    The difference of two readings says whether it is busy, be it in threads of its own, in a
    compiler that it has started, or in data loader workers.

    Args:
        pid: the process, of this process's pid namespace.
    """
    ticks = sum(stat.ticks for stat in _tree(pid))
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def loader_workers(pid: int) -> list[tuple[int, State]]:
    """Returns the workers of torch's data loaders among the descendants of a process.

    A worker has its name from the moment it has imported torch, so one that is just being spawned
    is not among them. Those that a fork server has started are its children.

    Args:
        pid: the process, of this process's pid namespace.

    Returns:
        The pid and the state of each worker, by pid.
    """
    return sorted(
        ((stat.pid, stat.state()) for stat in _tree(pid) if stat.name == _WORKER_NAME),
        key=lambda worker: worker[0],
    )


def catches(pid: int, signal: int) -> bool:
    """Returns whether a process has a handler for a signal, which would else have its usual effect.

    Args:
        pid: the process, of this process's pid namespace.
        signal: the number of the signal, from 1.
    """
    return has_signal(status_of(pid), "SigCgt", signal)


def status_of(pid: int) -> dict[str, str]:
    """Returns the fields of ``/proc/PID/status`` by name; none if there is no such process.

    Args:
        pid: the process, of this process's pid namespace. Fields of a thread are of its main one.
    """
    try:
        text = (_PROC / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in fields}


def has_signal(status: dict[str, str], field: str, signal: int) -> bool:
    """Returns whether a set of signals has a signal.

    Args:
        status: what :func:`status_of` has returned.
        field: the set's name, such as "SigCgt"; a set that is not there is empty.
        signal: the number of the signal, from 1.
    """
    return bool(int(status.get(field, "0"), 16) >> (signal - 1) & 1)


@dataclass(frozen=True)
class _Stat:
    """A line of ``/proc/PID/stat``."""

    pid: int
    name: str
    """At most 15 characters of the program's name, or what its main thread has called itself."""
    fields: tuple[str, ...]
    """What follows the name; the first of them is field 3 of proc(5)."""

    @classmethod
    def read(cls, pid: int) -> _Stat | None:
        """Reads that of a process; None if there is no such process."""
        try:
            text = (_PROC / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        # The name may itself have parentheses and spaces.
        head, _, tail = text.rpartition(")")
        return cls(pid, head.partition("(")[2], tuple(tail.split())) if tail else None

    @property
    def ticks(self) -> int:
        """CPU time of its threads, and of the ended children that it has waited for."""
        return sum(map(int, self.fields[11:15]))

    @property
    def born(self) -> int:
        return int(self.fields[19])

    def state(self) -> State:
        kind = _KINDS.get(self.fields[0], Kind.UNKNOWN)
        if kind in (Kind.SLEEPING, Kind.DISK):
            return State(kind, _where(self.pid))
        if kind is Kind.ZOMBIE and len(self.fields) > 49:
            return State(kind, returncode=_returncode(int(self.fields[49])))
        return State(kind)


def _tree(pid: int) -> Iterator[_Stat]:
    """Yields what the kernel says of a process and of its living descendants."""
    todo, seen = [pid], {pid}
    while todo:
        if (stat := _Stat.read(todo.pop())) is not None:
            yield stat
            new = set(_children(stat.pid)) - seen
            todo += new
            seen |= new


def _children(pid: int) -> Iterator[int]:
    """Yields the children of a process: each belongs to the thread that has started it."""
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return
    for thread in threads:
        try:
            text = (thread / "children").read_text()
        except OSError:  # the thread has ended
            continue
        yield from map(int, text.split())


def _where(pid: int) -> str:
    try:
        text = (_PROC / str(pid) / "wchan").read_text().strip()
    except OSError:
        return ""
    return "" if text == "0" else text.partition(".")[0]  # what compilers add says nothing


def _returncode(status: int) -> int | None:
    try:
        return os.waitstatus_to_exitcode(status)
    except ValueError:
        return None


def _name_of(signal: int) -> str:
    try:
        return signals.Signals(signal).name
    except ValueError:
        return f"signal {signal}"
