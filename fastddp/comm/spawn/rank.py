"""What runs in a rank: the function, a report of how it ended, and the parent's last word."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastddp.comm.launch import ensure_process_group
from fastddp.comm.spawn import by_value
from fastddp.comm.spawn.mailbox import post
from fastddp.comm.spawn.report import CALLED, LEAVE, Report


def rank_main(
    call: tuple[Callable[..., Any], tuple[Any, ...]],
    environment: Mapping[str, str],
    timeout_s: float | None,
    line: socket.socket,
) -> None:
    """Is one rank: the body of the new process.

    Args:
        call: the function, and the arguments that follow the rank.
        environment: the variables of a launcher, which :func:`fastddp.wrap` and torch read.
        timeout_s: seconds that a collective may take, None for torch's default.
        line: this process's end of a socket pair, on which it reports.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    post(line, CALLED)
    report = _run(*call, timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    post(line, pickle.dumps(report))
    try:
        if line.recv(len(LEAVE)) != LEAVE:  # the parent lets us go on, or stops us
            return
    except (OSError, KeyboardInterrupt):
        return
    if dist.is_initialized():  # fn may have destroyed it
        dist.barrier()  # a gloo thread still holding the last tensor aborts an ending interpreter
        dist.destroy_process_group()


def _run(fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float | None) -> Report:
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
        return Report(time.monotonic(), value=by_value.dumps(value))
    except Exception as error:  # anything may go wrong in what a class does on pickling
        return Report(time.monotonic(), no_value=f"{type(value).__name__}: {error}")


def _failure(error: BaseException) -> Report:
    exit_code = None
    if isinstance(error, SystemExit):
        exit_code = error.code if isinstance(error.code, int) else 1
    pickled = None
    with contextlib.suppress(Exception):
        pickled = by_value.dumps(error)
    return Report(
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
