"""The environment variables that fastddp reads, in one place."""

from __future__ import annotations

import os


def engine() -> str | None:
    """Returns ``FASTDDP_ENGINE``: ``native``, ``python``, or None to choose.

    Raises:
        ValueError: if it is set to anything else.
    """
    value = os.environ.get("FASTDDP_ENGINE") or None
    if value not in (None, "native", "python"):
        raise ValueError(f"FASTDDP_ENGINE={value!r} is not one of native, python")
    return value


def shm() -> bool:
    """Returns whether CPU tensors may go through shared memory: unless ``FASTDDP_SHM`` is 0.

    Raises:
        ValueError: if it is set to anything but 0 or 1.
    """
    return _is_on("FASTDDP_SHM")


def launcher() -> bool:
    """Returns whether variables of srun, mpirun and so on may make this process a rank.

    Unless ``FASTDDP_LAUNCHER`` is 0. Torchrun's variables count in any case.

    Raises:
        ValueError: if it is set to anything but 0 or 1.
    """
    return _is_on("FASTDDP_LAUNCHER")


def host_id() -> str | None:
    """Returns ``FASTDDP_HOST_ID``, by which ranks on one host count as being on several."""
    return os.environ.get("FASTDDP_HOST_ID") or None


def keep_memory() -> bool:
    """Returns whether ``FASTDDP_KEEP_MEMORY`` is 1, its default, rather than 0.

    Raises:
        ValueError: if it is set to anything else.
    """
    return _is_on("FASTDDP_KEEP_MEMORY")


def _is_on(name: str) -> bool:
    value = os.environ.get(name) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} is not one of 0, 1")
    return value == "1"
