"""Figures of many steps: the median, the 95th percentile and the trend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LEAST_FOR_A_TREND = 8
"""With fewer steps one slow step would be a trend."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What a duration was over the steps, in milliseconds."""

    median: float
    p95: float
    trend: float | None
    """The median of the second half of the steps minus that of the first; None if there are fewer
    than 8 steps."""


def figure(durations: Sequence[float]) -> Figure:
    """Returns the figures of a duration.

    Args:
        durations: nanoseconds by step, at least one.
    """
    half = len(durations) // 2
    trend = None
    if len(durations) >= LEAST_FOR_A_TREND:
        trend = (median(durations[half:]) - median(durations[:half])) / 1e6
    p95 = sorted(durations)[round(0.95 * (len(durations) - 1))]
    return Figure(median(durations) / 1e6, p95 / 1e6, trend)
