"""A ring of events in memory: the latest ones of a process, each a few words, in a fixed layout.

It consists of 64-bit words in the byte order of the machine: a header of 16 words, then the events
of 4 words each. Event number i lies in place i % capacity. ``csrc/core/events.h`` writes the same.

Whoever reads a ring that is being written, or that its writer died in, tells a whole event from a
torn one by the number in it: it is written last, and events before ``NEXT`` - capacity do not
count, whatever their numbers say.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from enum import IntEnum
from pathlib import Path

MAGIC = 0x3130_5645_5453_4146
"""The first word, which says "FASTEV01": which version of this layout a ring has."""
HEADER_WORDS = 16
EVENT_WORDS = 4
CAPACITY = 1 << 15
"""How many events a ring holds: a power of two. These take 1 MiB."""
NUMBER_BITS = 24
"""How many bits of its number an event carries."""
UNKNOWN_RANK = 2**64 - 1


class Header(IntEnum):
    """The words at the beginning of a ring."""

    MAGIC = 0
    CAPACITY = 1
    NEXT = 2
    """How many events were ever begun."""
    PID = 3
    RANK = 4
    """The rank in the default group, or :data:`UNKNOWN_RANK`."""
    WORLD_SIZE = 5
    """The number of ranks in the default group; 0 if it is not known."""
    MADE_NS = 6
    """When the ring was made, by ``time.monotonic_ns()``, the clock of all events."""
    MADE_EPOCH_NS = 7
    """The same moment by ``time.time_ns()``."""
    HOST = 8
    """A number that the processes of one host have in common; 0 if it is not known."""


_NEXT = int(Header.NEXT)


class Ring:
    """Memory that events are written to; by this object, or by C++ at :attr:`address`.

    The memory is never unmapped: a thread of C++ may be about to write to it, also while the
    interpreter ends.

    Args:
        memory: a ring in the layout above.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        """Where the memory is, for C++."""
        self._memory = memory
        self._words = memoryview(memory).cast("Q")
        self._numbers = itertools.count(self._words[Header.NEXT])
        self._last = self._words[Header.CAPACITY] - 1
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))

    @classmethod
    def make(cls, capacity: int = CAPACITY) -> Ring:
        """Makes an empty ring in memory of this process alone: a forked child gets a copy."""
        size = (HEADER_WORDS + capacity * EVENT_WORDS) * 8
        if hasattr(mmap, "MAP_PRIVATE"):
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(-1, size)
        words = memoryview(memory).cast("Q")
        words[Header.CAPACITY] = capacity
        words[Header.PID] = os.getpid()
        words[Header.RANK] = UNKNOWN_RANK
        words[Header.MADE_NS] = time.monotonic_ns()
        words[Header.MADE_EPOCH_NS] = time.time_ns()
        words[Header.MAGIC] = MAGIC
        return cls(memory)

    def continued_in(self, path: Path) -> Ring:
        """Returns a ring in a file that goes on where this one is now. The file is left behind.

        Raises:
            OSError: if the file cannot be written, for one because the disk is full.
        """
        # Written, not made longer: a page that is found to have no room on the disk ends the
        # process by a signal. Renamed, since the file may be another process's memory.
        beside = path.with_suffix(".new")
        try:
            with beside.open("w+b") as file:
                file.write(self.copy())
                file.flush()
                memory = mmap.mmap(file.fileno(), 0)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        return Ring(memory)

    def set(self, word: Header, value: int) -> None:
        """Sets a word of the header."""
        self._words[word] = value

    def get(self, word: Header) -> int:
        """Returns a word of the header."""
        return self._words[word]

    def write(self, kind: int, owner: int, a: int, b: int) -> None:
        """Writes an event that happens now, in place of the oldest one. Holds no lock.

        C++ must not write to the ring at the same time.

        Args:
            kind: what has happened, a :class:`fastddp.watch.events.Kind`.
            owner: the number of the model that the event concerns, 32 bits; 0 for none.
            a: the first of the two numbers of the event, 64 bits.
            b: the second one, 64 bits.
        """
        words = self._words
        number = next(self._numbers)
        at = HEADER_WORDS + (number & self._last) * EVENT_WORDS
        words[_NEXT] = number + 1
        words[at] = time.monotonic_ns()
        words[at + 2] = a
        words[at + 3] = b
        words[at + 1] = kind | (number & (1 << NUMBER_BITS) - 1) << 8 | owner << 32

    def copy(self) -> bytes:
        """Returns all bytes of the ring, at any time; events that are half written do not count."""
        content = bytearray(self._memory)
        # What was overwritten while it was copied is older than this says.
        memoryview(content).cast("Q")[Header.NEXT] = self._words[Header.NEXT]
        return bytes(content)
