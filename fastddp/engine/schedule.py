"""When full buckets are launched: as they fill, or all at the end of backward.

To launch buckets as they fill hides communication where a core is free for it; where every core
computes, it only adds switches between threads. The first rounds of a plan try both in turn, and in
the next round the ranks add up their best times. So all ranks have the same schedule in the same
round: otherwise a collective of another model, or of the user's, would come before a bucket on one
rank and after it on another.
``csrc/core/schedule.h`` is the same in C++.
"""

from __future__ import annotations

import math

_TRIALS = 10


class Schedule:
    """The schedule of one plan: tried first, then decided by all ranks."""

    def __init__(self) -> None:
        self._begun = 0
        self._early = False
        self.early_us = math.inf
        self.late_us = math.inf

    def begin(self) -> bool:
        """Begins a round; returns whether it launches its buckets as they fill."""
        nth = self._begun
        self._begun += 1
        return nth % 2 == 1 if nth < _TRIALS else self._early

    def add(self, was_early: bool, round_us: float) -> None:
        """Takes note of the time that a round took, if it ended well."""
        if was_early:
            self.early_us = min(self.early_us, round_us)
        else:
            self.late_us = min(self.late_us, round_us)

    @property
    def is_due(self) -> bool:
        """Whether the ranks add up their best times in the round that is under way."""
        return self._begun == _TRIALS + 1

    def decide(self, sum_early_us: float, sum_late_us: float) -> None:
        """Chooses the schedule that took the ranks less time in total.

        Args:
            sum_early_us: the best times of rounds that launched buckets as they filled, added up.
            sum_late_us: the best times of the other rounds, added up over the ranks."""
        self._early = sum_early_us < sum_late_us
