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
    """The median of the second half of the steps over that of the first, minus 1; None if there are
    fewer than 8 steps, or if the first half took no time."""


def figure(durations: Sequence[Sequence[int]]) -> Figure:
    """Returns the figures of a duration.

    Args:
        durations: nanoseconds, by rank and then by step; not all empty.
    """
    pooled = sorted(ns for rank in durations for ns in rank)
    first = [ns for rank in durations for ns in rank[: len(rank) // 2]]
    second = [ns for rank in durations for ns in rank[len(rank) // 2 :]]
    trend = None
    if len(pooled) >= LEAST_FOR_A_TREND * len(durations) and median(first) > 0:
        trend = median(second) / median(first) - 1
    p95 = pooled[min(len(pooled) - 1, round(0.95 * (len(pooled) - 1)))]
    return Figure(median(pooled) / 1e6, p95 / 1e6, trend)
