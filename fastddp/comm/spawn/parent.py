"""`spawn`: a function run on several ranks of this machine, started from plain Python.

The parent starts the ranks, keeps the store at which they meet, and judges how they end. A rank
reports how its function ended, then waits for the parent's word: to leave the group together with
all others, or to be stopped. So a rank that failed still holds its connections while the parent
stops the others, and none of them fails only because a peer went away.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist

from fastddp.comm.launch import ensure_process_group, open_local_store
from fastddp.comm.launchers import LOOPBACK
from fastddp.comm.spawn import by_value
from fastddp.comm.spawn.by_value import Parcel
from fastddp.comm.spawn.mailbox import Mailbox, post
from fastddp.errors import RankError

_START_METHOD: Final = "spawn"  # not fork: neither CUDA nor a running thread survives it
# What a rank says before its report, and the parent's last word.
_CALLED: Final = b""
_LEAVE: Final = b"."
# How long other ranks' failures are collected after one is seen, so that the first is not merely
# the one whose report was read first.
_COLLECT_S = 0.5
# A process that a rank forked may keep the rank's end of a pipe open: do not rely on its closing.
_POLL_S = 0.5
# How long a killed process may take to be gone; one that hangs in the kernel is given up.
_REAP_S = 10.0
# What transports say when the other side is gone. Errors with this in the traceback follow from
# another rank's.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited|timed out waiting"
    r"|watchdog caught|failed: (timed out: )?rank \d+ (\(process \d+\)|has left the group)",
    re.IGNORECASE,
)


def spawn(
    fn: Callable[..., Any],
    nprocs: int | None = None,
    args: Sequence[Any] = (),
    *,
    timeout_s: float | None = None,
    grace_s: float = 5.0,
) -> list[Any]:
    """Runs ``fn(rank, *args)`` in ``nprocs`` new processes that form one process group.

    Like ``torch.multiprocessing.spawn``, and: the default group exists when ``fn`` is called and is
    destroyed after it (``fn`` calls neither ``init_process_group`` nor a rendezvous; gloo for the
    CPU, nccl too where there are GPUs), the launcher's variables are set as torchrun sets them (so
    that :func:`fastddp.wrap` picks this rank's GPU), each rank uses its share of the CPU cores
    (``OMP_NUM_THREADS``, unless it is set), and what ``fn`` returns comes back.

    If a rank fails, the others are stopped, and the error of the one that failed *first* is raised
    here. Ranks that merely lost their peer do not count as first. The ranks end with the calling
    process, however it ends.

    Args:
        fn: a function. One of a module travels by name; any other, as a lambda or one of a
            notebook, ``python -c`` or standard input, by value, with what it refers to, if
            cloudpickle is installed. A script that calls ``spawn`` does so under
            ``if __name__ == "__main__":``, because every rank imports it.
        nprocs: number of ranks. By default as many as there are GPUs; without any, 2: one process
            uses all cores as well, so that ranks on the CPU are for trying things out.
        args: the further arguments; pickled, tensors are shared.
        timeout_s: of each collective and of the start, in seconds; by default torch's (30 minutes
            for gloo, 10 for nccl). ``fn`` itself may take as long as it likes.
        grace_s: how many seconds a rank has from SIGTERM to SIGKILL when the ranks are stopped.

    Returns:
        What ``fn`` returned, by rank (torch's returns None). Where that cannot be pickled, None,
        and a RuntimeWarning says so.

    Raises:
        TypeError: if ``fn`` or ``args`` cannot be pickled; says whether cloudpickle would help.
        ValueError: if ``nprocs`` is less than 1, or more than there are GPUs; if ``timeout_s`` is
            not positive.
        Exception: the one that a rank's ``fn`` raised, with "rank 1 of 2: " before its message
            where that is a plain text, and a :class:`fastddp.RankError` as its cause, which shows
            the rank's traceback.
        RankError: if a rank was killed, exited, or raised what cannot be pickled.

    Example::

        def train(rank, epochs):
            model = fastddp.wrap(Model())
            ...
            return loss

        if __name__ == "__main__":
            losses = fastddp.spawn(train, args=(10,))
    """
    nprocs = _check(fn, nprocs, args)
    if timeout_s is not None and timeout_s <= 0:
        raise ValueError(f"fastddp.spawn: timeout_s={timeout_s} is no time; None is the default")
    context = multiprocessing.get_context(_START_METHOD)
    store = open_local_store()
    ranks: list[_Rank] = []
    try:
        with _omp_threads(nprocs):
            for rank in range(nprocs):
                ours, theirs = socket.socketpair()
                environment = _environment(rank, nprocs, store.port)
                process = context.Process(
                    target=_rank_main,
                    args=(Parcel((fn, tuple(args))), environment, timeout_s, theirs),
                    name=f"rank-{rank}",
                )
                ranks.append(_Rank(rank, process, ours))
                with theirs:
                    _start(process, fn)
        _wait(ranks, lambda rank: rank.report is not None)
        for r in ranks:
            r.leave_group()
        _wait(ranks, lambda rank: rank.exit_code is not None)
    finally:
        _stop(ranks, grace_s)
        del store  # now: an error's traceback would keep it, and its port, for longer
    return [_value(r, nprocs) for r in ranks]


@dataclass(frozen=True)
class _Report:
    """How a rank's function ended."""

    at: float  # time.monotonic(), which is one clock for all processes
    value: bytes | None = None  # pickled
    no_value: str = ""  # why it could not be pickled
    error: bytes | None = None  # pickled
    error_name: str = ""
    error_text: str = ""  # the traceback
    exit_code: int | None = None  # of sys.exit()

    @property
    def failed(self) -> bool:
        return bool(self.error_name)


# --- the parent -----------------------------------------------------------------------------------


class _Rank:
    """The parent's side of one rank.

    Args:
        rank: which.
        process: not started yet.
        line: this end of what it reports through.
    """

    def __init__(self, rank: int, process: BaseProcess, line: socket.socket) -> None:
        self.rank = rank
        self.process = process
        self.line = line
        self.mailbox = Mailbox(line)
        self.was_called = False
        self.report: _Report | None = None
        self.exit_code: int | None = None
        self.ended_at = 0.0

    def poll(self) -> None:
        """Takes note of what has happened since the last call."""
        exit_code = self.process.exitcode  # before the mailbox, which then holds all that was said
        for message in self.mailbox.take():
            self.was_called = True
            if message != _CALLED:
                self.report = pickle.loads(message)
        if exit_code is not None and self.exit_code is None:
            self.exit_code, self.ended_at = exit_code, time.monotonic()

    def leave_group(self) -> None:
        """Lets a rank whose function has returned go on to its end."""
        with contextlib.suppress(OSError):  # it may be dead, which `poll` will find out
            self.line.send(_LEAVE)

    @property
    def handles(self) -> list[Any]:
        """What to wait for: its words until it has reported, then its end."""
        if self.report is not None or self.mailbox.is_closed:
            return [self.process.sentinel]
        return [self.process.sentinel, self.mailbox]

    @property
    def failed(self) -> bool:
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


def _wait(ranks: Sequence[_Rank], is_done: Callable[[_Rank], bool]) -> None:
    """Returns when all ranks are done.

    Raises:
        Exception: that of the rank that failed first, if one fails.
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


def _raise(first: _Rank, ranks: Sequence[_Rank]) -> NoReturn:
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


def _unpickle_error(report: _Report) -> Exception | None:
    if report.error is None:
        return None
    try:
        error = pickle.loads(report.error)
    except Exception:  # anything may go wrong in what a class does on unpickling
        return None
    return error if isinstance(error, Exception) else None


def _stop(ranks: Sequence[_Rank], grace_s: float) -> None:
    """Ends the processes that still run; returns when there are none."""
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


def _value(rank: _Rank, nprocs: int) -> Any:
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


def _check(fn: Callable[..., Any], nprocs: int | None, args: Sequence[Any]) -> int:
    """Returns the number of ranks."""
    if not callable(fn):
        raise TypeError(f"fastddp.spawn: expected a function, got {type(fn).__name__}")
    if nprocs is not None and not isinstance(nprocs, int):
        raise TypeError(
            f"fastddp.spawn: nprocs={nprocs!r} is no number. The order is spawn(fn, nprocs, args),"
            " not that of torch.multiprocessing.spawn; name the arguments"
        )
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"fastddp.spawn: args={args!r} is no tuple; for one argument, (argument,)")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nprocs is None:
        return num_gpus or 2
    if nprocs < 1:
        raise ValueError(f"fastddp.spawn: nprocs={nprocs}, less than 1")
    if num_gpus and nprocs > num_gpus:
        raise ValueError(
            f"fastddp.spawn: nprocs={nprocs}, but there are {num_gpus} GPU(s) and each rank needs"
            " one; set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    return nprocs


def _start(process: BaseProcess, fn: Callable[..., Any]) -> None:
    can_send_by_value = by_value.can_send_by_value()
    if getattr(fn, "__module__", None) == "__main__" and not (
        can_send_by_value or by_value.main_can_be_imported()
    ):
        raise TypeError(
            "fastddp.spawn: this function is in no file that the ranks could import; to send such"
            " functions, pip install cloudpickle"
        )
    try:
        with by_value.main_left_alone():
            process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        which = "arguments that can be pickled"
        if not can_send_by_value:
            which = f"a function of a module and {which}, or pip install cloudpickle for others"
        raise TypeError(
            f"fastddp.spawn: the function and its arguments travel to the ranks by pickle; use"
            f" {which} ({error})"
        ) from error


@contextlib.contextmanager
def _omp_threads(nprocs: int) -> Iterator[None]:
    """Gives the processes that are started inside their share of the cores.

    By this process's own environment: thread pools are made on import, before a rank's own code
    could set the variable.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // nprocs))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


def _environment(rank: int, nprocs: int, port: int) -> dict[str, str]:
    """Returns the variables that torchrun would set, and where gloo finds the other ranks."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(nprocs),
        "LOCAL_WORLD_SIZE": str(nprocs),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # The store exists already: no rank is to open it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    if "GLOO_SOCKET_IFNAME" not in os.environ and loopback in dict(socket.if_nameindex()).values():
        # gloo would look its host's name up, which may fail, or lead past a firewall.
        environment["GLOO_SOCKET_IFNAME"] = loopback
    return environment


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- the rank -------------------------------------------------------------------------------------


def _rank_main(
    call: tuple[Callable[..., Any], tuple[Any, ...]],
    environment: Mapping[str, str],
    timeout_s: float | None,
    line: socket.socket,
) -> None:
    """Is one rank: the body of the new process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    post(line, _CALLED)
    report = _run(*call, timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    post(line, pickle.dumps(report))
    try:
        if line.recv(len(_LEAVE)) != _LEAVE:  # the parent lets us go on, or stops us
            return
    except (OSError, KeyboardInterrupt):
        return
    if dist.is_initialized():  # fn may have destroyed it
        dist.barrier()  # a gloo thread still holding the last tensor aborts an ending interpreter
        dist.destroy_process_group()


def _run(fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> _Report:
    try:
        ensure_process_group(None if timeout_s is None else timedelta(seconds=timeout_s))
        try:
            value = fn(int(os.environ["RANK"]), *args)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            value = None
    except BaseException as error:
        return _failure(error)
    try:
        return _Report(time.monotonic(), value=by_value.dumps(value))
    except Exception as error:  # anything may go wrong in what a class does on pickling
        return _Report(time.monotonic(), no_value=f"{type(value).__name__}: {error}")


def _failure(error: BaseException) -> _Report:
    exit_code = None
    if isinstance(error, SystemExit):
        exit_code = error.code if isinstance(error.code, int) else 1
    pickled = None
    with contextlib.suppress(Exception):
        pickled = by_value.dumps(error)
    return _Report(
        time.monotonic(),
        error=pickled,
        error_name=type(error).__name__,
        error_text="".join(traceback.format_exception(error)),
        exit_code=exit_code,
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
