"""Boards of other processes on this host: where they are, and how they are read.

What another process says is data: its board may be cut short, overwritten, or not a board at all,
and its process may be gone and the number given to another one.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass

from fastddp.watch.layout import WORDS
from fastddp.watch.process import born
from fastddp.watch.snapshot import Snapshot, parse

_ADDRESS = re.compile(r"([0-9a-f]{1,64}) (\d{1,10}) (\d{1,20}) (-1|\d{1,10})")


@dataclass(frozen=True)
class Address:
    """Where the board of a process is."""

    host: str
    """Equal for processes that may be able to open each other's memory."""
    pid: int
    born: int
    """When the process began, in clock ticks since the boot of the machine."""
    fd: int
    """The descriptor of the board in that process; -1 if it cannot be read."""

    def __str__(self) -> str:
        return f"{self.host} {self.pid} {self.born} {self.fd}"

    @classmethod
    def parse(cls, text: bytes) -> Address | None:
        """Reads an address that a process has published; None if it is not one."""
        found = _ADDRESS.fullmatch(text[:256].decode(errors="replace"))
        if found is None:
            return None
        return cls(found[1], int(found[2]), int(found[3]), int(found[4]))


class Peer:
    """The board of another process. Opened at the first reading, and readable after its death.

    Args:
        address: the place of the board.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.has_failed = False
        """Whether the board could not be read when that was last tried."""
        self._fd: int | None = None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)

    def read(self) -> Snapshot | None:
        """Returns what the board says now; None if it cannot be read."""
        snapshot = self._read()
        self.has_failed = snapshot is None
        return snapshot

    def _read(self) -> Snapshot | None:
        try:
            if self._fd is None:
                self._fd = self._open()
            if self._fd is None:
                return None
            # Copied by the kernel and not mapped: a file that is cut short would kill the reader.
            size = 8 * WORDS
            snapshot = parse(os.pread(self._fd, size, 0), os.pread(self._fd, size, 0))
        except OSError:
            return None
        if snapshot is None:
            return None
        is_own = (snapshot.pid, snapshot.born) == (self.address.pid, self.address.born)
        return snapshot if is_own else None

    def _open(self) -> int | None:
        address = self.address
        if address.fd < 0 or born(address.pid) != address.born:
            return None
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", flags)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return None
