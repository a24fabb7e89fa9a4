"""When something is done about a wait: all follows from ``FASTDDP_STALL_SECONDS``."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_TICK_S, _MIN_TICK_S = 1.0, 0.05
_TICKS_PER_STALL = 5


@dataclass(frozen=True)
class Timing:
    """The pace of the watcher."""

    stall_s: float
    """After how long a wait is told of."""

    @property
    def stall_ns(self) -> int:
        """The same in nanoseconds."""
        return int(1e9 * self.stall_s)

    @property
    def tick_s(self) -> float:
        """How often the watcher looks."""
        return min(_MAX_TICK_S, max(_MIN_TICK_S, self.stall_s / _TICKS_PER_STALL))

    def soon_s(self, seconds: float) -> float:
        """Returns these seconds, or less where waits are told of so soon that less is needed."""
        return min(seconds, self.stall_s / _TICKS_PER_STALL)
