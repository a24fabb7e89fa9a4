"""How people are told: through logging, and on stderr where no handler leads there."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence

_log = logging.getLogger("fastddp")


def say(lines: Sequence[str]) -> None:
    """Tells people some lines, as one warning.

    Args:
        lines: the lines, without line ends.
    """
    text = "\n".join(lines)
    _log.warning("%s", text)
    if _log.isEnabledFor(logging.WARNING) and not _reaches_stderr():
        with contextlib.suppress(OSError, ValueError):  # it is closed, or a pipe without a reader
            print(text, file=sys.stderr, flush=True)


def _reaches_stderr() -> bool:
    """Returns whether a warning comes to stderr, or to a stdout that people see instead."""
    logger: logging.Logger | None = _log
    found = False
    while logger is not None:
        for handler in logger.handlers:
            found = True
            if _leads_to_terminal(handler):
                return True
        logger = logger.parent if logger.propagate else None
    return not found and logging.lastResort is not None


def _leads_to_terminal(handler: logging.Handler) -> bool:
    if handler.level > logging.WARNING:
        return False
    stream = getattr(handler, "stream", None)
    if stream is None:
        return type(handler).__module__.startswith("rich.")
    return stream in (sys.stderr, sys.__stderr__, sys.stdout, sys.__stdout__)
