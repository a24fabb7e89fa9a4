"""The environment variables of fastddp's own that it reads at run time, in one place.

``docs/environment.md`` lists them with those of the build and of the tests.
"""

from __future__ import annotations

import os
from pathlib import Path


def engine() -> str | None:
    """Returns ``FASTDDP_ENGINE``: ``native``, ``python``, or None if fastddp may choose.

    Raises:
        ValueError: if the variable is set to anything else.
    """
    value = os.environ.get("FASTDDP_ENGINE") or None
    if value not in (None, "native", "python"):
        raise ValueError(f"FASTDDP_ENGINE={value!r} is not one of native, python")
    return value


def shm() -> bool:
    """Returns whether CPU tensors may go through shared memory: yes unless ``FASTDDP_SHM`` is 0.

    Raises:
        ValueError: if the variable is neither 0 nor 1.
    """
    return _is_on("FASTDDP_SHM")


def launcher() -> bool:
    """Returns whether variables of srun, mpirun and so on may make this process a rank.

    They may unless ``FASTDDP_LAUNCHER`` is 0. Torchrun's variables always may.

    Raises:
        ValueError: if the variable is neither 0 nor 1.
    """
    return _is_on("FASTDDP_LAUNCHER")


def host_id() -> str | None:
    """Returns ``FASTDDP_HOST_ID``: ranks with different values count as being on different hosts.

    None if it is not set. Then the ranks that can open each other's memory are one host.
    """
    return os.environ.get("FASTDDP_HOST_ID") or None


def keep_memory() -> bool:
    """Returns whether memory of large CPU tensors is kept: yes unless ``FASTDDP_KEEP_MEMORY`` is 0.

    Raises:
        ValueError: if the variable is neither 0 nor 1.
    """
    return _is_on("FASTDDP_KEEP_MEMORY")


def stall() -> str:
    """Returns ``FASTDDP_STALL``: what is done about ranks that wait for each other for long.

    ``raise`` tells what they wait for, and ends waits that can never end; ``warn`` only tells;
    ``off`` does not look.

    Raises:
        ValueError: if the variable is set to anything else.
    """
    value = os.environ.get("FASTDDP_STALL") or "raise"
    if value not in ("raise", "warn", "off"):
        raise ValueError(f"FASTDDP_STALL={value!r} is not one of raise, warn, off")
    return value


def stall_seconds() -> float:
    """Returns ``FASTDDP_STALL_SECONDS``: after how many seconds a wait is told of; 10 by default.

    Raises:
        ValueError: if the variable is not a number greater than 0.
    """
    text = os.environ.get("FASTDDP_STALL_SECONDS") or "10"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"FASTDDP_STALL_SECONDS={text!r} is not a number greater than 0")
    return seconds


def trace() -> Path | None:
    """Returns ``FASTDDP_TRACE``: the folder for files with the ranks' events; None for no files."""
    value = os.environ.get("FASTDDP_TRACE")
    return Path(value).absolute() if value else None


def side_stream() -> bool:
    """Returns whether inputs go to their GPU on a stream of their own, as torch's variable says."""
    return os.environ.get("PYTORCH_DDP_USE_SIDE_STREAM", "1") == "1"


def _is_on(name: str) -> bool:
    value = os.environ.get(name) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} is not one of 0, 1")
    return value == "1"
