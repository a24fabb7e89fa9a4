"""Summaries of interleaved samples: quantiles, figures, and intervals that noise gives them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Samples = Mapping[str, Sequence[float]]
"""For each variant one value per round. Values with the same index come from the same round."""

Figure = Callable[[Samples], "float | None"]


@dataclass(frozen=True)
class Estimate:
    """A figure computed from all rounds, with its bootstrap interval.

    Attributes:
        value: the value of the figure; None if the samples do not show it, such as a share of an
            overhead of 0.
        low: the lower end of the interval; None if noise hides it.
        high: the upper end of the interval; None if noise hides it.
    """

    value: float | None
    low: float | None
    high: float | None


def quantile(values: Sequence[float], fraction: float) -> float:
    """Returns the value below which `fraction` of the values lie, interpolated linearly."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median(values: Sequence[float]) -> float:
    """Returns the median of the values."""
    return quantile(values, 0.5)


def best(samples: Samples, names: Sequence[str]) -> str:
    """Returns the one with the smallest median of the named variants that were measured."""
    return min((name for name in names if name in samples), key=lambda name: median(samples[name]))


def slowest_rank(per_rank: Sequence[Sequence[float]]) -> list[float]:
    """Returns the longest time of each step over all ranks: a step ends with its slowest rank."""
    return [max(step) for step in zip(*per_rank, strict=True)]


def share_removed(cost: float, of: float) -> float | None:
    """Returns the share of the cost `of` that is gone if `cost` is left; None without a cost."""
    return 1 - cost / of if of > 0 else None


def estimate(
    samples: Samples, figure: Figure, *, level: float = 0.95, draws: int = 1000
) -> Estimate:
    """Computes a figure and its bootstrap interval (Efron, 1979).

    Whole rounds are drawn with replacement, so that a slow moment which affected all variants of a
    round keeps affecting all of them. There is no interval if the figure does not exist in more
    draws than the interval leaves out on one side.

    Args:
        samples: the samples of all variants that the figure needs.
        figure: the function that computes the figure from samples.
        level: the probability that the interval covers.
        draws: the number of times that rounds are drawn.
    """
    value = figure(samples)
    rounds = len(next(iter(samples.values())))
    chance = random.Random(0)
    drawn: list[float] = []
    for _ in range(draws):
        picks = chance.choices(range(rounds), k=rounds)
        resampled = figure({name: [column[k] for k in picks] for name, column in samples.items()})
        if resampled is not None:
            drawn.append(resampled)
    tail = (1 - level) / 2
    if value is None or len(drawn) < (1 - tail) * draws:
        return Estimate(value, None, None)
    return Estimate(value, quantile(drawn, tail), quantile(drawn, 1 - tail))
