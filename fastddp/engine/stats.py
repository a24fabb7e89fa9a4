"""The figures of a reducer that is written in Python, and of a model that has no reducer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoundStats:
    """A snapshot with the meanings of :class:`fastddp.engine.interface.Stats`; all zero at first.

    Never changed, but replaced: a script may keep one from before.
    """

    rounds: int = 0
    wait_us_total: float = 0.0
    wait_us_last: float = 0.0
    bytes_per_round: int = 0
    num_buckets: int = 0
    overlaps: bool = True
    began_ns: int = 0
    backward_us_last: float = 0.0
    comm_us_last: float = 0.0
    unused_bytes_last: int = 0
    is_static: bool = True
