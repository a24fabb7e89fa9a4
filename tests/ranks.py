"""Run a function on several ranks, each a process; get the values or the first failure back.

A rank is forked from a server that has already imported torch, so a call costs tens of milliseconds
and still every call gets fresh processes: no state, thread, hook or group outlives the call that
made it, and a rank that was killed leaves nothing to repair.

    def body(rank, world_size, scale):          # a module-level function: it travels by name
        t = torch.full((3,), float(rank * scale))
        dist.all_reduce(t)
        return t.tolist()

    assert run_ranks(body, 2, 4) == [[4.0] * 3] * 2

What a rank sees: a gloo default group over a file store on loopback (unless `init_group=False`),
one torch thread, the caller's environment without a launcher's variables (RANK, MASTER_ADDR, ...)
but with `env`.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Whatever a rank would otherwise import again in every call. The tests' own modules are not here:
# the server must not run code that starts threads, because a fork keeps only the thread that
# forked.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.optim",
    "torch._dynamo",
    "pytest",
    "tests.ranks",
)
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# Time for the reports of ranks that failed together with the first one. Without it the failure that
# is shown would depend on which pipe was read first.
GRACE_S = 0.5
OUTPUT_TAIL_CHARS = 6000


class RankFailed(Exception):
    """A rank raised, died or hung; the text holds the rank, its traceback and its output.

    `rank` is the first failed rank (for a hang: the lowest rank that had not finished), `reason`
    one of "raised", "died", "timeout", and `error_type` the name of the exception's class where
    there is one.
    """

    def __init__(self, text: str, *, rank: int, reason: str, error_type: str = "") -> None:
        super().__init__(text)
        self.rank = rank
        self.reason = reason
        self.error_type = error_type


@dataclass(frozen=True)
class Died:
    """The value of a rank that ended without a report and was allowed to (`expect_dead`)."""

    exitcode: int


@dataclass(frozen=True)
class _Order:
    """What a rank is told to do."""

    rank: int
    world_size: int
    folder: str
    call: bytes  # pickled (fn, args); unpickled only after sys.path is set
    environ: dict[str, str]
    sys_path: list[str]
    init_group: bool
    group_timeout_s: float

    @property
    def output(self) -> Path:
        return Path(self.folder, f"output-{self.rank}")

    @property
    def stacks(self) -> Path:
        return Path(self.folder, f"stacks-{self.rank}")


@dataclass(frozen=True)
class _Report:
    """What a rank says when it is through."""

    value: bytes | None  # pickled
    stamp: float  # time.monotonic() when the function ended: one clock for all processes
    error_type: str = ""
    error_text: str = ""


@dataclass
class _Rank:
    """The parent's side of one rank."""

    order: _Order
    process: Any
    pipe: multiprocessing.connection.Connection
    report: _Report | None = None
    died_at: float | None = None
    state: str = field(default="running")


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 50.0,
    env: Mapping[str, str | None] | None = None,
    init_group: bool = True,
    expect_dead: Collection[int] = (),
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on every rank and return the values in rank order.

    The first failure is raised as `RankFailed` and ends the other ranks. After `timeout` seconds
    every rank is killed and the error shows where each of them stood. In `env` a value of None
    removes the variable. Ranks in `expect_dead` may end without a report (a test that kills them);
    their value is `Died`.
    """
    __tracebackhide__ = True  # pytest shows the test and the error; the error holds the rank's own
    call = _pickle_call(fn, args)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                ranks.append(
                    _start(
                        _Order(
                            rank=rank,
                            world_size=world_size,
                            folder=folder,
                            call=call,
                            environ=_environ(env or {}),
                            sys_path=list(sys.path),
                            init_group=init_group,
                            group_timeout_s=timeout,
                        )
                    )
                )
            _collect(ranks, time.monotonic() + timeout, expect_dead)
            for r in ranks:
                if r.report is None and r.died_at is None:
                    r.state = "not finished"
            failure = _failure(ranks, timeout, expect_dead)
        finally:
            _end(ranks)
        for r in ranks:
            sys.stdout.write(_read(r.order.output))
    if failure is not None:
        raise failure
    return [_value(r) for r in ranks]


def init_group(backend: str = "gloo", timeout_s: float | None = None) -> None:
    """Create the call's default group, for ranks that were started with `init_group=False`."""
    import torch.distributed as dist

    order = _order
    assert order is not None, "init_group() is for functions that run under run_ranks()"
    dist.init_process_group(
        backend,
        init_method=f"file://{order.folder}/store",
        rank=order.rank,
        world_size=order.world_size,
        timeout=datetime.timedelta(seconds=timeout_s or order.group_timeout_s),
    )
    # A rank leaves init_process_group while its peers still connect, and a barrier while they are
    # still in it. If it ended or broke the group now, as a test of faults may, theirs would fail.
    dist.barrier()
    _meet(order, time.monotonic() + order.group_timeout_s)


def _meet(order: _Order, deadline: float) -> None:
    """Wait, without a collective, until every rank is here as often as this one."""
    global _meetings
    _meetings += 1
    here = Path(order.folder, f"meeting-{_meetings}")
    here.with_suffix(f".{order.rank}").touch()
    for other in range(order.world_size):
        while not here.with_suffix(f".{other}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {order.rank}: rank {other} has not left a barrier")
            time.sleep(0.001)


def scratch_folder() -> Path:
    """Return the folder that this call's ranks share; it is removed when the call ends."""
    assert _order is not None, "scratch_folder() is for functions that run under run_ranks()"
    return Path(_order.folder)


# --- the parent -----------------------------------------------------------------------------------


def _pickle_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except Exception as error:
        raise TypeError(
            f"{fn!r} and its arguments travel to the ranks by pickle: "
            f"use a module-level function. {error}"
        ) from error


def _environ(env: Mapping[str, str | None]) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    for name, value in env.items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value
    return environ


def _start(order: _Order) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_rank_main, args=(order, theirs), name=f"rank-{order.rank}", daemon=False
    )
    process.start()
    theirs.close()
    return _Rank(order, process, ours)


def _collect(ranks: list[_Rank], deadline: float, expect_dead: Collection[int]) -> None:
    """Read reports until all are through, the deadline passes or a failure's grace is over."""
    while True:
        waiting = [r for r in ranks if r.report is None and r.died_at is None]
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            return
        by_handle = {r.pipe: r for r in waiting}
        for handle in multiprocessing.connection.wait(list(by_handle), left):
            _read_report(by_handle[handle])  # type: ignore[index]
        failed = [r for r in ranks if r.state in ("raised", "died")]
        if any(r.order.rank not in expect_dead or r.state == "raised" for r in failed):
            deadline = min(deadline, time.monotonic() + GRACE_S)


def _read_report(rank: _Rank) -> None:
    try:
        rank.report = pickle.loads(rank.pipe.recv_bytes())
        rank.state = "raised" if rank.report.value is None else "finished"
    except (EOFError, ConnectionError):  # the write end closes only when the process ends
        rank.died_at = time.monotonic()
        rank.state = "died"


def _failure(ranks: list[_Rank], timeout: float, expect_dead: Collection[int]) -> RankFailed | None:
    dead = [r for r in ranks if r.died_at is not None and r.order.rank not in expect_dead]
    raised = [r for r in ranks if r.state == "raised"]
    world_size = len(ranks)
    if dead:  # before what the others raised: losing a peer is what makes them raise
        first = min(dead, key=lambda r: r.died_at or 0.0)
        first.process.join()
        title = (
            f"rank {first.order.rank} of {world_size} died: {_exit_text(first.process.exitcode)}"
        )
        return _rank_failed(title, first, ranks, "died")
    if raised:
        first = min(raised, key=lambda r: r.report.stamp if r.report else 0.0)
        assert first.report is not None
        title = f"rank {first.order.rank} of {world_size} raised {first.report.error_type}"
        return _rank_failed(title, first, ranks, "raised")
    late = [r for r in ranks if r.state == "not finished"]
    if late:
        _dump_stacks(late)
        names = ", ".join(str(r.order.rank) for r in late)
        title = f"rank(s) {names} of {world_size} had not finished after {timeout:g} s"
        return _rank_failed(title, late[0], ranks, "timeout")
    return None


def _rank_failed(title: str, first: _Rank, ranks: list[_Rank], reason: str) -> RankFailed:
    parts = [title]
    error_type = ""
    if first.report is not None:
        error_type = first.report.error_type
        parts.append(f"--- rank {first.order.rank}: traceback ---\n{first.report.error_text}")
    for r in ranks:
        if stack := _read(r.order.stacks):
            parts.append(f"--- rank {r.order.rank}: stacks ---\n{stack}")
    parts.append(
        "--- all ranks ---\n" + "\n".join(f"rank {r.order.rank}: {r.state}" for r in ranks)
    )
    for r in ranks:
        if r is not first and r.state == "raised" and r.report is not None:
            parts.append(f"--- rank {r.order.rank}: raised later ---\n{r.report.error_text}")
    for r in ranks:
        if output := _read(r.order.output)[-OUTPUT_TAIL_CHARS:]:
            parts.append(f"--- rank {r.order.rank}: output ---\n{output}")
    return RankFailed("\n".join(parts), rank=first.order.rank, reason=reason, error_type=error_type)


def _exit_text(exitcode: int) -> str:
    if exitcode < 0:
        return f"killed by signal {signal.Signals(-exitcode).name}"
    return f"exit status {exitcode} and no report"


def _dump_stacks(ranks: list[_Rank]) -> None:
    for r in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(r.process.pid, signal.SIGUSR1)
    until = time.monotonic() + 2.0
    while time.monotonic() < until and not all(_read(r.order.stacks) for r in ranks):
        time.sleep(0.02)
    time.sleep(0.1)  # a stack is written line by line


def _end(ranks: list[_Rank]) -> None:
    for r in ranks:
        if r.report is None or r.report.value is None:
            # The group, because a rank may have started processes of its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(r.process.pid, signal.SIGKILL)
            r.process.kill()
    for r in ranks:
        r.process.join(timeout=10.0)
        if r.process.exitcode is None:
            r.process.kill()
            r.process.join()
        r.pipe.close()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _value(rank: _Rank) -> Any:
    if rank.report is None:
        return Died(rank.process.exitcode)
    assert rank.report.value is not None
    return pickle.loads(rank.report.value)


# --- the rank -------------------------------------------------------------------------------------

_order: _Order | None = None
_meetings = 0  # of this call's ranks
_stacks_file: Any = None  # kept open for the process's life: faulthandler holds only its number


def _rank_main(order: _Order, pipe: Any) -> None:
    """Be one rank: the body of the forked process."""
    global _order
    _order = order
    _settle(order)
    try:
        value = _run(order)
        report = _Report(value, time.monotonic())
    except BaseException as error:
        report = _Report(None, time.monotonic(), type(error).__name__, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(pickle.dumps(report))
    if report.value is None:
        # The parent kills us. Ending here on our own would make the peers fail too, and blur which
        # was first.
        time.sleep(3600)


def _settle(order: _Order) -> None:
    """Make the forked process independent: group, output, environment, signals, lifeline."""
    global _stacks_file
    os.setpgid(0, 0)
    _die_with_parent()
    output = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    _stacks_file = open(order.stacks, "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=_stacks_file, all_threads=True)
    faulthandler.enable(file=sys.stderr)
    for name in list(os.environ):
        if name not in order.environ:
            del os.environ[name]
    os.environ.update(order.environ)
    sys.path[:] = order.sys_path
    gc.freeze()  # else the last collection looks through, and so copies, all that is inherited


def _die_with_parent() -> None:
    """Starts a thread that ends the process's group with the parent.

    No frame of it is of a script's: of a thread that has one, the watcher does not know what it
    will call.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    then = contextlib.ExitStack()  # calls the last one first
    then.callback(os.killpg, 0, signal.SIGKILL)
    then.callback(parent.join)
    threading.Thread(target=then.close, daemon=True).start()


def _run(order: _Order) -> bytes:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if order.init_group:
        init_group()
    fn, args = pickle.loads(order.call)
    value = pickle.dumps(fn(order.rank, order.world_size, *args))
    del fn, args
    gc.collect()  # a wrapped module must be gone before its group
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return value
