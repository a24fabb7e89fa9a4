"""Which ranks can share memory, from what each rank says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastddp.comm.meeting import read_text
from fastddp.version import __version__

Parts = tuple[int, int, int, int, int]
"""Where a segment is: process, descriptor, bytes, and the two halves of a nonce."""


class Announcement(NamedTuple):
    """What a rank says of itself before memory is shared."""

    host: str | None
    """Equal for ranks that may be able to open each other's memory; None where it is not known."""
    heap: Parts | None
    """Where the rank's heap is; None for a rank that has none."""
    version: str
    """The version of fastddp that the rank runs."""
    why_not: str | None
    """Why the rank cannot share memory; None if it can."""

    @classmethod
    def read(cls, message: Any) -> Announcement:
        """Reads an announcement from another rank's message.

        Raises:
            ValueError, TypeError, LookupError: if a part is not what it should be.
        """
        return cls(
            read_text(message["host"], optional=True),
            read_address(message["heap"]),
            read_text(message["version"]),
            read_text(message["why_not"], optional=True),
        )


class Hosts(NamedTuple):
    """The ranks of a group, by host."""

    ranks: list[list[int]]
    """The ranks of each host, ascending; the hosts in the order of their first ranks."""
    mine: list[int]
    """The ranks of this rank's host."""

    @property
    def num_lanes(self) -> int:
        """How many ranks every host has at least: so many pairs can cross hosts side by side."""
        return min(map(len, self.ranks))

    def lane(self, place: int) -> list[int]:
        """Returns the ranks that have a place on their hosts; none where a host lacks one.

        Args:
            place: the place of a rank among those of its host, from 0.
        """
        return [local[place] for local in self.ranks] if place < self.num_lanes else []


class Choice(NamedTuple):
    """Whether the ranks share memory."""

    hosts: Hosts | None
    """None where there is nothing to share or all ranks were told not to: nothing to report."""
    problem: str | None
    """Why this rank cannot take part although others want to; None if it can."""


def choose_hosts(said: Sequence[Announcement], rank: int) -> Choice:
    """Returns who shares memory with whom: the same hosts on every rank.

    Args:
        said: the announcements of all ranks, by rank.
        rank: this rank's number.
    """
    by_host: dict[str | None, list[int]] = {}
    for other, announcement in enumerate(said):
        by_host.setdefault(announcement.host, []).append(other)
    if 1 < len(by_host) == len(said):
        return Choice(None, None)  # as it has to be: no two ranks share a host
    reasons = [announcement.why_not for announcement in said]
    if len(set(reasons)) == 1 and all(reasons):
        return Choice(None, None)  # as asked for, on every rank
    mine = said[rank]
    problem = mine.why_not
    if len({announcement.version for announcement in said}) > 1:
        problem = problem or f"it has fastddp {mine.version}, another rank has not"
    return Choice(Hosts(list(by_host.values()), by_host[mine.host]), problem)


def read_address(parts: Any) -> Parts | None:
    """Reads where a segment is, from another rank's message; None for no segment.

    Raises:
        ValueError, TypeError: if the parts cannot be those of a segment.
    """
    if parts is None:
        return None
    process, descriptor, size, high, low = parts
    for part, least, bits in (
        (process, 1, 31),
        (descriptor, 0, 31),
        (size, 1, 63),
        (high, 0, 64),
        (low, 0, 64),
    ):
        if type(part) is not int or not least <= part < 1 << bits:
            raise ValueError(f"not an address of a segment: {parts!r}")
    return process, descriptor, size, high, low


def announced(address: Parts | None) -> Parts:
    """Returns an address that a rank must have announced.

    Raises:
        RuntimeError: if it has not.
    """
    if address is None:
        raise RuntimeError("a rank has announced no memory")
    return address


def introduction(heap: Parts | None, host: str | None, why_not: str | None) -> dict[str, Any]:
    """Returns the message that :meth:`Announcement.read` reads on the other ranks.

    Args:
        heap: the address of this rank's heap, if it has one.
        host: what :func:`fastddp.watch.host.this_host` has returned, if it could.
        why_not: why this rank cannot share memory, cut to fit into a message; None if it can.
    """
    return {"host": host, "heap": heap, "version": __version__, "why_not": why_not}
