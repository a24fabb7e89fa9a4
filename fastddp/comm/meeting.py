"""Small messages between the ranks that are about to share memory.

What arrives is data, whoever sent it: it is read by functions that raise where it is not what it
should be, and never trusted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastddp.comm.loans import Loan, settle

_log = logging.getLogger("fastddp")
_T = TypeVar("_T")

_MESSAGE_BYTES = 4096
_UNREADABLE = {"host": None, "heap": None, "version": "", "why_not": None, "control": None}
"""Read in the place of a message that is not what it should be."""


class Meeting:
    """Exchanges messages between all ranks, and with them what is wrong on one of them.

    Args:
        backend: a c10d backend of the ranks, such as gloo's.
        rank: this rank's number.
        size: the number of ranks.
    """

    def __init__(self, backend: Any, rank: int, size: int) -> None:
        self._backend = backend
        self._rank = rank
        self._size = size
        self.problem: str | None = None
        """What is wrong on this rank; goes out with the next message."""
        self.all_ok = True
        """Whether no rank has told of a problem. The same on all ranks."""

    def attempt(self, action: Callable[[], _T]) -> _T | None:
        """Returns what ``action`` returns; if it raises, None, and this rank has a problem."""
        try:
            return action()
        except (RuntimeError, OSError) as error:
            self.problem = explained(error)
            return None

    def exchange(self, mine: dict[str, Any], read: Callable[[Any], _T]) -> list[_T]:
        """Returns what ``read`` makes of what each rank sent, by rank. Collective.

        Args:
            mine: this rank's message, which has to fit into 4096 bytes of JSON.
            read: makes something of a parsed message; raises ValueError, TypeError or LookupError
                where the message is not what it should be. All ranks see the same, and then
                `all_ok` is False everywhere.
        """
        data = json.dumps({**mine, "trouble": short(self.problem)}).encode()
        sent = torch.frombuffer(bytearray(data.ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self._size)]
        loans = [Loan(tensor) for tensor in (sent, *received)]
        self._backend.allgather([received], [sent]).wait()
        settle(loans)
        messages = []
        for other, tensor in enumerate(received):
            problem, message = self._read(bytes(tensor.numpy()), read)
            messages.append(message)
            if problem is not None and self.all_ok:
                self.all_ok = False
                if self._rank == 0:
                    _log.warning(
                        "the ranks' memory is not shared, all goes through gloo: rank %d: %s",
                        other,
                        problem,
                    )
        return messages

    def synchronise(self) -> None:
        """Waits until every rank has come this far; finds out whether all are well. Collective."""
        self.exchange({}, lambda _: None)

    def _read(self, data: bytes, read: Callable[[Any], _T]) -> tuple[str | None, _T]:
        """Returns the problem of a rank, and what it sent."""
        try:
            message = json.loads(data)
            return read_text(message["trouble"], optional=True), read(message)
        except (ValueError, TypeError, LookupError, RecursionError):
            return "it sent what cannot be read", read(_UNREADABLE)


def read_text(value: Any, optional: bool = False) -> Any:
    """Returns a part of a message that is a text.

    Args:
        value: the part, as JSON gave it.
        optional: whether None will do as well.

    Raises:
        TypeError: if it is anything else.
    """
    if not (isinstance(value, str) or (optional and value is None)):
        raise TypeError(f"not a text: {value!r}")
    return value


def short(text: str | None) -> str | None:
    """Cuts a text so that two fit into a message, whatever JSON makes of their characters."""
    most = _MESSAGE_BYTES // 3
    while text is not None and len(json.dumps(text)) > most:
        text = text[: min(most, len(text)) * 3 // 4]
    return text


def explained(error: Exception) -> str:
    """Returns what an exception says, and about too many open files what to do."""
    text = str(error)
    if os.strerror(errno.EMFILE) not in text or sys.platform == "win32":
        return text
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"this process has as many files open as it may, {limit} (RLIMIT_NOFILE); raise the limit "
        f"(ulimit -n), or make fewer process groups: {text}"
    )
