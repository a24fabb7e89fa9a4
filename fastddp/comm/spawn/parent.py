"""What the parent of the ranks does: it waits for them, judges how they ended, and stops them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import pickle
import re
import signal
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Final, NoReturn

from fastddp.comm.spawn import by_value
from fastddp.comm.spawn.mailbox import Mailbox
from fastddp.comm.spawn.report import CALLED, LEAVE, Report
from fastddp.errors import RankError

# How long other ranks' failures are collected after one is seen, so that the first is not merely
# the one whose report was read first.
_COLLECT_S: Final = 0.5
# A process that a rank forked may keep the rank's end of a pipe open: do not rely on its closing.
_POLL_S: Final = 0.5
# How long a killed process may take to be gone; one that hangs in the kernel is given up.
_REAP_S: Final = 10.0
# What transports say when the other side is gone. Errors with this in the traceback follow from
# another rank's.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited|timed out waiting"
    r"|watchdog caught|failed: (timed out: )?rank \d+ (\(process \d+\)|has left the group)",
    re.IGNORECASE,
)


class Rank:
    """The parent's side of one rank.

    Args:
        rank: the rank's number, from 0.
        process: the rank's process, which may not be started yet.
        line: this process's end of the socket pair on which the rank reports.
    """

    def __init__(self, rank: int, process: BaseProcess, line: socket.socket) -> None:
        self.rank = rank
        self.process = process
        self.line = line
        self.mailbox = Mailbox(line)
        self.was_called = False
        self.report: Report | None = None
        self.exit_code: int | None = None
        self.ended_at = 0.0

    def poll(self) -> None:
        """Takes note of what has happened since the last call."""
        exit_code = self.process.exitcode  # before the mailbox, which then holds all that was said
        for message in self.mailbox.take():
            self.was_called = True
            if message != CALLED:
                self.report = pickle.loads(message)
        if exit_code is not None and self.exit_code is None:
            self.exit_code, self.ended_at = exit_code, time.monotonic()

    def leave_group(self) -> None:
        """Lets a rank whose function has returned go on to its end."""
        with contextlib.suppress(OSError):  # it may be dead, which `poll` will find out
            self.line.send(LEAVE)

    @property
    def handles(self) -> list[Any]:
        """What to wait for: the rank's words until it has reported, then its end."""
        if self.report is not None or self.mailbox.is_closed:
            return [self.process.sentinel]
        return [self.process.sentinel, self.mailbox]

    @property
    def failed(self) -> bool:
        """Whether the function raised, or the process ended in another way than it should."""
        if self.report is None:
            return self.exit_code is not None
        return self.report.failed or bool(self.exit_code)

    @property
    def suspicion(self) -> tuple[bool, bool, float]:
        """Orders failures: the smallest is that of the rank that failed first.

        A failure of its own goes before one that losing a peer explains, among which is an abort:
        that is how transports' watchdogs end a process. A death goes before an exception: the first
        explains the second.
        """
        if self.report is not None and self.report.failed:
            return bool(_LOST_PEER.search(self.report.error_text)), True, self.report.at
        return self.exit_code == -signal.SIGABRT, False, self.ended_at

    def outcome(self) -> str:
        """Says in a few words how it stands."""
        if self.report is not None and self.report.failed:
            if self.report.exit_code is not None:
                return f"called sys.exit({self.report.exit_code})"
            return f"raised {self.report.error_name}"
        if self.exit_code is not None:
            when = ""
            if self.report is not None:
                when = " after its function had returned"
            elif not self.was_called:
                when = " before its function was called"
            elif self.mailbox.holds_part:
                when = " while it sent what its function had returned"
            if self.exit_code < 0:
                return f"was killed by {_signal_name(-self.exit_code)}{when}"
            return f"exited with code {self.exit_code}{when}"
        return "was running" if self.report is None else "was through"


def wait(ranks: Sequence[Rank], is_done: Callable[[Rank], bool]) -> None:
    """Returns when all ranks are done.

    Args:
        ranks: the ranks to wait for, all of them.
        is_done: returns whether a rank that has not failed needs no more waiting.

    Raises:
        Exception: the error of the rank that failed first, if one fails.
    """
    collect_until = float("inf")
    while True:
        for r in ranks:
            r.poll()
        failed = [r for r in ranks if r.failed]
        waiting = [r for r in ranks if not r.failed and not is_done(r)]
        if failed:
            collect_until = min(collect_until, time.monotonic() + _COLLECT_S)
        left = min(collect_until - time.monotonic(), _POLL_S)
        if failed and (not waiting or left <= 0):
            _raise(min(failed, key=lambda r: r.suspicion), ranks)
        if not waiting:
            return
        multiprocessing.connection.wait([h for r in waiting for h in r.handles], left)


def _raise(first: Rank, ranks: Sequence[Rank]) -> NoReturn:
    """Raises what says that this rank failed."""
    name = f"rank {first.rank} of {len(ranks)}"
    text = f"fastddp.spawn: {name} {first.outcome()}"
    if others := ", ".join(f"rank {r.rank} {r.outcome()}" for r in ranks if r is not first):
        text += f" (the others: {others})"
    report = first.report
    if report is None or not report.failed:
        if not first.was_called:
            text += f"; its own message is above. {_why_not_called()}"
        raise RankError(text, first.rank, first.exit_code)
    text += f"\n\n{report.error_text}"
    cause = RankError(text, first.rank, report.exit_code)
    error = _unpickle_error(report)
    if error is None:
        raise cause
    if type(error).__str__ is BaseException.__str__ and len(error.args) <= 1:
        error.args = (": ".join([name, *map(str, error.args)]),)
    raise error from cause


def _why_not_called() -> str:
    if by_value.main_can_be_imported():
        return (
            "Every rank imports the script: is spawn called under 'if __name__ == \"__main__\":'?"
        )
    if by_value.can_send_by_value():
        return "Every rank imports what the function and its arguments refer to by name"
    return "What is in no file cannot be imported there; pip install cloudpickle to send it"


def _unpickle_error(report: Report) -> Exception | None:
    if report.error is None:
        return None
    try:
        error = pickle.loads(report.error)
    except Exception:  # anything may go wrong in what a class does on unpickling
        return None
    return error if isinstance(error, Exception) else None


def stop(ranks: Sequence[Rank], grace_s: float) -> None:
    """Ends the processes that still run; returns when there are none.

    Args:
        ranks: the ranks to stop, started or not.
        grace_s: seconds that a process has from SIGTERM to SIGKILL.
    """
    started = [r.process for r in ranks if r.process.pid is not None]
    try:
        for process in started:
            process.terminate()
        _join(started, grace_s)
    finally:  # also if Ctrl-C is pressed again
        for process in started:
            process.kill()
        _join(started, _REAP_S)
        for r in ranks:
            r.line.close()


def _join(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Returns when all have ended, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while running := [p for p in processes if p.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        # A process's own `join` relies on its sentinel, which one that it forked may keep open.
        multiprocessing.connection.wait([p.sentinel for p in running], min(left, _POLL_S))


def value_of(rank: Rank, nprocs: int) -> Any:
    """Returns what a rank's function has returned; None, with a warning, where that cannot be sent.

    Args:
        rank: a rank that has reported and not failed.
        nprocs: the number of ranks, for the warning.
    """
    assert rank.report is not None
    if rank.report.value is None:
        warnings.warn(
            f"fastddp.spawn: what rank {rank.rank} of {nprocs} returned cannot be pickled"
            f" ({rank.report.no_value}); None is in its place",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return pickle.loads(rank.report.value)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
