"""Summaries of interleaved samples: quantiles, figures, and how far noise may move them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Samples = Mapping[str, Sequence[float]]
"""Per variant, one value per round; index k of every variant was taken in the same round."""

Figure = Callable[[Samples], "float | None"]


@dataclass(frozen=True)
class Estimate:
    """A figure from all rounds, and the interval in which resampled rounds put it, where they can.

    None stands for what the samples leave open, such as a share of an overhead they do not show.
    """

    value: float | None
    low: float | None
    high: float | None


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the samples lie, interpolating between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def best(samples: Samples, names: Sequence[str]) -> str:
    """Of the named variants that were measured, the one with the smallest median."""
    return min((name for name in names if name in samples), key=lambda name: median(samples[name]))


def slowest_rank(per_rank: Sequence[Sequence[float]]) -> list[float]:
    """A synchronised step is over when its slowest rank is done."""
    return [max(step) for step in zip(*per_rank, strict=True)]


def share_removed(cost: float, of: float) -> float | None:
    """How much of the cost `of` is gone when `cost` is left; None where there was none at all."""
    return 1 - cost / of if of > 0 else None


def estimate(
    samples: Samples, figure: Figure, *, level: float = 0.95, draws: int = 1000
) -> Estimate:
    """A figure with its bootstrap interval.

    Rounds are drawn with replacement and kept whole, so that a slow moment which hit all variants
    of a round stays common to them. The interval is left open where the figure does not exist in
    more draws than the interval leaves out on one side.
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
