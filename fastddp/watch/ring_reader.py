"""Reads rings of events, also those of processes that died while they wrote, or of strangers.

Nothing in a ring is trusted: a word may say anything, and the memory may have been copied while its
owner wrote to it. An event counts only where its number is the one that its place has to hold.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastddp.watch.events import Kind
from fastddp.watch.ring import EVENT_WORDS, HEADER_WORDS, MAGIC, NUMBER_BITS, Header

MOST_EVENTS = 1 << NUMBER_BITS
"""An event carries the lowest bits of its number, so a larger ring would be ambiguous."""
LATEST = 1 << 62
"""Times from here on, in nanoseconds, are not times: a century and more after the boot."""


class Event(NamedTuple):
    """Something that a process has done."""

    at: int
    """When, in nanoseconds of the clock ``time.monotonic_ns()`` of the host."""
    kind: Kind
    owner: int
    """The number of the model that it is about, or 0."""
    a: int
    b: int


@dataclass(frozen=True, eq=False)
class Ring:
    """What a ring says; the events are decoded as they are asked for."""

    pid: int
    rank: int | None
    """The rank in the default group; None where the process did not know it."""
    world_size: int | None
    made_ns: int
    """When the ring was made, on the monotonic clock."""
    made_epoch_ns: int
    """The same moment in nanoseconds since 1970."""
    host: int | None
    """A number that processes have in common which share a monotonic clock; None: unknown."""
    num_begun: int
    """How many events the process has begun to write; the ring holds the latest of them."""
    num_torn: int
    """How many of these were overwritten or half written when the ring was read."""
    words: npt.NDArray[np.uint64]
    """The whole events by time, one a row."""

    def __len__(self) -> int:
        return len(self.words)

    def events(self) -> Iterator[Event]:
        """Yields the events by time; those of one moment in the order of writing."""
        for at, kind, a, b in self.words.tolist():
            yield Event(at, Kind(kind & 0xFF), kind >> 32, a, b)

    def epoch_ns(self, at: int) -> int:
        """Returns a time of the monotonic clock in nanoseconds since 1970.

        Args:
            at: the time of an event, in nanoseconds.
        """
        return self.made_epoch_ns + at - self.made_ns


def parse(data: bytes | memoryview, num_begun_since: int | None = None) -> Ring:
    """Returns what is whole in a copy of a ring's memory.

    Args:
        data: the memory, which may end early.
        num_begun_since: what the header's ``NEXT`` said after the copy was made, if the process may
            have gone on writing: events that it may have been overwriting meanwhile are left out.

    Raises:
        ValueError: if the header is not that of a ring.
    """
    if len(data) < 8 * HEADER_WORDS:
        raise ValueError(
            f"a ring of events has a header of {8 * HEADER_WORDS} bytes; "
            f"this has {len(data)} bytes in all"
        )
    header: list[int] = np.frombuffer(data, np.uint64, HEADER_WORDS).tolist()
    if header[Header.MAGIC] != MAGIC:
        raise ValueError(f"a ring of events begins with {MAGIC:#x}, not {header[Header.MAGIC]:#x}")
    capacity, begun = header[Header.CAPACITY], header[Header.NEXT]
    if not 1 <= capacity <= MOST_EVENTS or capacity & (capacity - 1):
        raise ValueError(
            f"a capacity of {capacity} events is not a power of two up to {MOST_EVENTS}"
        )
    if begun >= LATEST:
        raise ValueError(f"a ring that was written to {begun} times")
    there = min(capacity, len(data) // 8 // EVENT_WORDS - HEADER_WORDS // EVENT_WORDS)
    words = np.frombuffer(data, np.uint64, there * EVENT_WORDS, 8 * HEADER_WORDS)
    num_begun = min(begun, capacity)
    events = _whole(words.reshape(there, EVENT_WORDS), capacity, begun, num_begun_since or begun)
    rank, world_size, host = header[Header.RANK], header[Header.WORLD_SIZE], header[Header.HOST]
    is_ranked = rank < world_size <= 1 << 31
    return Ring(
        pid=header[Header.PID],
        rank=rank if is_ranked else None,
        world_size=world_size if is_ranked else None,
        made_ns=header[Header.MADE_NS],
        made_epoch_ns=header[Header.MADE_EPOCH_NS],
        host=host or None,
        num_begun=begun,
        num_torn=num_begun - len(events),
        words=events,
    )


def _whole(
    words: npt.NDArray[np.uint64], capacity: int, begun: int, begun_since: int
) -> npt.NDArray[np.uint64]:
    """Returns the events that lie where their numbers belong, by time."""
    first = min(begun, max(0, begun - capacity, begun_since - capacity))
    numbers = np.arange(first, begun, dtype=np.uint64)
    places = numbers % np.uint64(capacity)
    is_there = places < len(words)
    numbers, places = numbers[is_there], places[is_there]
    events = words[places]
    kinds = events[:, 1] & np.uint64(0xFF)
    is_whole = (
        ((events[:, 1] >> np.uint64(8)) & np.uint64(0xFFFFFF) == numbers & np.uint64(0xFFFFFF))
        & (kinds >= min(Kind))
        & (kinds <= max(Kind))
        & (events[:, 0] > 0)
        & (events[:, 0] < LATEST)
    )
    events = events[is_whole]
    by_time: npt.NDArray[np.uint64] = events[np.argsort(events[:, 0], kind="stable")]
    return by_time


def read(path: Path) -> Ring:
    """Returns what is whole in the file of a ring, also while its process writes to it.

    Args:
        path: a regular file; anything else is refused and not waited for.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a ring.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(8 * (HEADER_WORDS + EVENT_WORDS * MOST_EVENTS))
        again = os.pread(descriptor, 8, 8 * Header.NEXT)
    return parse(data, int.from_bytes(again, sys.byteorder))
