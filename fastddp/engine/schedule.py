"""When full buckets are launched: as they fill, or all at the end of backward.

The former hides communication where a core is free for it; where every core computes it only adds
switches between threads. The first rounds of a plan try both in turn, and the best of each decides.
Each rank decides for itself: when a rank launches does not change what is reduced with what.
``csrc/core/schedule.h`` is the same in C++.
"""

from __future__ import annotations

import math

_TRIALS = 10


class Schedule:
    """The choice for one plan."""

    def __init__(self) -> None:
        self._rounds = 0
        self._early_us = math.inf
        self._late_us = math.inf

    @property
    def is_early(self) -> bool:
        """Whether the next round launches its buckets as they fill."""
        if self._rounds < _TRIALS:
            return self._rounds % 2 == 1
        return self._early_us < self._late_us

    def add(self, round_us: float) -> None:
        """Takes note of how long such a round took."""
        if self._rounds == _TRIALS:
            return
        if self.is_early:
            self._early_us = min(self._early_us, round_us)
        else:
            self._late_us = min(self._late_us, round_us)
        self._rounds += 1
