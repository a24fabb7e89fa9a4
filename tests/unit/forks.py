"""Processes that run a script with fastddp imported already: forks of one process that waits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastddp.watch import process

_SOURCE = """
import json, os, signal, sys
import torch.distributed
from fastddp.watch import process, stack

def tell(*what):
    print(json.dumps(what), flush=True)

def let_ask():
    pid = os.getpid()
    tell(pid, process.born(pid), *stack.let_ask())

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
tell()
while path := sys.stdin.readline().strip():
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.stdin = open(os.devnull)
        names = {"__name__": "__main__", "tell": tell, "let_ask": let_ask}
        exec(compile(open(path).read(), path, "exec"), names)
        os._exit(0)
"""


class Asked(NamedTuple):
    """A process that can be asked for its stack: what ``let_ask`` told."""

    pid: int
    born: int
    signal: int
    fd: int

    def lives(self) -> bool:
        dead = process.Kind.GONE, process.Kind.ZOMBIE
        return process.state_of(self.pid, self.born).kind not in dead


class Forks:
    """Starts the processes and reads what they tell, one line of JSON at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scripts = 0
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._told: list[Asked] = []
        self.read()

    def start(self, source: str) -> str:
        """Run a script, in which ``tell`` and ``let_ask`` are defined; return the script's path."""
        self._scripts += 1
        path = self._folder / f"train_{self._scripts}.py"
        path.write_text(source)
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{path}\n")
        self._parent.stdin.flush()
        return str(path)

    def read(self) -> Any:
        """Return what a process has told."""
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line, "a process has ended instead of telling something"
        return json.loads(line)

    def read_asked(self) -> Asked:
        """Return what ``let_ask`` has told; the process ends with the test."""
        self._told.append(Asked(*self.read()))
        return self._told[-1]

    def end_all(self) -> None:
        """End the processes that have told how to ask them."""
        for asked in self._told:
            if asked.lives():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(asked.pid, signal.SIGKILL)
        self._told.clear()

    def close(self) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self.end_all()
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """Yield what starts processes, and end them all."""
    started = Forks(folder)
    try:
        yield started
    finally:
        started.close()
