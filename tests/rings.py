"""Rings of events that tests write by hand: what a process would have recorded."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from fastddp.watch.events import Kind
from fastddp.watch.ring import HEADER_WORDS, MAGIC, UNKNOWN_RANK

MS = 1_000_000
"""Nanoseconds of a millisecond."""
OWNER = 77
"""The number of a model."""

Words = tuple[int, Kind, int, int, int]
"""An event: its time in nanoseconds, its kind, its owner, a and b."""


def ring(
    events: Iterable[Words],
    *,
    rank: int | None = 0,
    world_size: int = 2,
    host: int = 1,
    made_ns: int = 0,
    made_epoch_ns: int = 0,
    capacity: int = 1024,
) -> bytes:
    """Returns the memory of a ring that these events were written to, one after the other."""
    words = [0] * (HEADER_WORDS + 4 * capacity)
    count = 0
    for number, (at, kind, owner, a, b) in enumerate(events):
        place = HEADER_WORDS + 4 * (number % capacity)
        words[place : place + 4] = [at, kind | (number & 0xFFFFFF) << 8 | owner << 32, a, b]
        count = number + 1
    header = [MAGIC, capacity, count, 4321, UNKNOWN_RANK if rank is None else rank, world_size]
    words[:9] = [*header, made_ns, made_epoch_ns, host]
    return struct.pack(f"<{len(words)}Q", *words)


def step(
    number: int,
    at: int,
    *,
    forward: int = 10,
    backward: int = 20,
    exposed: int = 5,
    optimizer: int = 3,
    launched: Sequence[int] = (),
    owner: int = OWNER,
    num_bytes: int = 1000,
) -> list[Words]:
    """Returns the events of a step, with times in milliseconds from the moment `at` on.

    The collectives in `launched` are launched so many milliseconds after the backward began. The
    last one ends with the round, and the rank waits for all of them from the end of backward on.
    """
    t = at * MS
    begin, end = t + forward * MS, t + (forward + backward) * MS
    over = end + exposed * MS
    events = [
        (t, Kind.FORWARD_BEGIN, owner, number, 0),
        (begin, Kind.FORWARD_END, owner, 0, 0),
        (begin, Kind.ROUND_BEGIN, owner, number, 0),
        *((begin + ms * MS, Kind.LAUNCH, owner, n, num_bytes) for n, ms in enumerate(launched)),
        (end, Kind.BACKWARD_END, owner, 0, 0),
    ]
    for n in range(len(launched)):
        events.append((end, Kind.WAIT_BEGIN, owner, n, 0))
        events.append((over, Kind.WAIT_END, owner, n, 0))
    events.append((over, Kind.ROUND_END, owner, number, 0))
    if optimizer:
        events.append((over, Kind.OPTIMIZER_BEGIN, 0, 0, 0))
        events.append((over + optimizer * MS, Kind.OPTIMIZER_END, 0, 0, 0))
    return events


def meeting(
    number: int,
    begin: int,
    met: int,
    end: int,
    *,
    last: int,
    by: int,
    owner: int = OWNER,
    num_bytes: int = 1000,
    group: int = 5,
) -> list[Words]:
    """Returns the events of a collective in shared memory, with times in milliseconds.

    Args:
        last: the rank that was the last to come.
        by: how many milliseconds it came after the first.
    """
    key = number | group << 32
    return [
        (begin * MS, Kind.COLLECTIVE_BEGIN, owner, key, num_bytes | 1 << 56),
        (met * MS, Kind.COLLECTIVE_MET, owner, key, last << 40 | by * MS),
        (end * MS, Kind.COLLECTIVE_END, owner, key, 0),
    ]


def by_time(*parts: Iterable[Words]) -> list[Words]:
    """Returns events in the order of their times; those of one moment as they are given."""
    return sorted((event for part in parts for event in part), key=lambda event: event[0])
