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
