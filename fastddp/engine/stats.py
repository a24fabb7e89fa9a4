"""What synchronisation has cost a rank: the figures of a reducer, whichever engine it is of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of the synchronised backwards ("rounds") so far, as the host of this rank saw them.

    A snapshot: a script may keep one from before. ``print`` shows it in a few lines.
    """

    rounds: int = 0
    """The number of synchronised backwards."""
    wait_us_total: float = 0.0
    """Microseconds of waiting at the ends of backwards, until the last bucket was reduced.

    This is the communication that was not hidden. For collectives on a GPU the host does not wait,
    so nothing is counted.
    """
    wait_us_last: float = 0.0
    """Microseconds of waiting at the end of the latest synchronised backward."""
    bytes_per_round: int = 0
    """Bytes that go into the collectives of one round; 0 before the first round."""
    num_buckets: int = 0
    """The number of buckets, one collective each, per round; 0 before the first round."""
    overlaps: bool = True
    """Whether the latest round launched buckets while backward ran, and not all at its end.

    On the shared-memory backend the first rounds try both ways, and the faster one stays.
    """
    began_ns: int = 0
    """The time at which the latest round began, in nanoseconds since the epoch."""
    backward_us_last: float = 0.0
    """Microseconds from the begin of the latest round to the end of its backward."""
    comm_us_last: float = 0.0
    """Microseconds from the first collective of the latest round to the end of the last one."""
    unused_bytes_last: int = 0
    """Bytes of the parameters for which this rank had no gradient in the latest round."""
    is_static: bool = True
    """Whether the parameters without a gradient have been the same in every round."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name, for a logger or a file."""
        return asdict(self)

    def __str__(self) -> str:
        if self.rounds == 0:
            return "no synchronised backward so far"
        mean_us = self.wait_us_total / self.rounds
        when = "while backward runs" if self.overlaps else "at the end of backward"
        rows = {
            "buckets": f"{self.num_buckets}, {_size(self.bytes_per_round)} in all, launched {when}",
            "waiting": f"{_time(mean_us)} per backward, {_time(self.wait_us_total)} in all",
            "latest backward": f"{_time(self.backward_us_last)}, then {_time(self.wait_us_last)} of"
            " waiting",
            "latest communication": f"{_time(self.comm_us_last)} from first launch to last result",
            "unused parameters": self._unused(),
        }
        lines = [f"{self.rounds} synchronised backward{'s' if self.rounds > 1 else ''}"]
        return "\n".join(lines + [f"  {name:<20}  {value}" for name, value in rows.items()])

    def _unused(self) -> str:
        if not self.unused_bytes_last and self.is_static:
            return "none"
        before = "the same in all" if self.is_static else "others before"
        return f"{_size(self.unused_bytes_last)} in the latest backward, {before}"


def _time(us: float) -> str:
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us < 999.5 * scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us / 1e6:.1f} s"


def _size(num_bytes: int) -> str:
    for unit, scale in (("bytes", 1), ("KiB", 1 << 10), ("MiB", 1 << 20)):
        if num_bytes < 1000 * scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / (1 << 30):.1f} GiB"
