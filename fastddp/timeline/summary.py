"""The summary of a run: figures of each part of a step, and who was last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fastddp.timeline.figures import Figure, figure
from fastddp.timeline.matched import Last, find_last
from fastddp.timeline.parts import Part, parts_of, tells_lateness
from fastddp.timeline.recording import Step


@dataclass(frozen=True, slots=True)
class Durations:
    """How long the parts of a step took, on one rank or on the average of the ranks."""

    step: Figure
    """The whole step, from the end of the one before."""
    parts: dict[Part, Figure]
    """Those that took any time."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class LastRank:
    """How often a rank was the last to come, and by how much; times in milliseconds."""

    rank: int
    num_last: int
    share: float
    """Of the steps for which it is known which rank was last."""
    by: float
    """How much later than the first rank it came in these steps, the median."""
    total: float
    """The same, the sum of these steps."""
    before_forward: float | None
    """How much of that was before its forward began, the median; None if it is not known."""
    in_forward: float | None
    in_backward: float | None


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What the recordings tell of the steps of one model."""

    owner: int
    """The model's number, the same on all ranks."""
    first: int
    last: int
    """The numbers of the first and the last step that are known."""
    ranks: dict[int, Durations]
    """By rank."""
    average: Durations
    """Of the average over the ranks, step by step."""
    lasts: list[LastRank]
    """The ranks that were last, those first that cost the others most."""
    tells_lateness: bool
    """Whether it is known how much of the exposed communication was waiting for late ranks."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the same as dictionaries, lists and numbers, in milliseconds."""
        return {
            "model": self.owner,
            "first_step": self.first,
            "last_step": self.last,
            "tells_lateness": self.tells_lateness,
            "average_of_ranks": _as_dict(self.average),
            "ranks": {rank: _as_dict(durations) for rank, durations in self.ranks.items()},
            "last_to_come": [asdict(last) for last in self.lasts],
        }


def _as_dict(durations: Durations) -> dict[str, Any]:
    return {
        "steps": durations.num_steps,
        "step": asdict(durations.step),
        **{part.value: asdict(figure) for part, figure in durations.parts.items()},
    }


def summarize(together: Sequence[Mapping[int, Step]], world_size: int | None) -> list[ModelSummary]:
    """Returns a summary for each model, in the order of their first steps.

    Args:
        together: the steps that ranks took together, each by rank, on one clock.
        world_size: the number of ranks that there are; None if it is not known.
    """
    by_owner: dict[int, list[Mapping[int, Step]]] = {}
    for steps in together:
        by_owner.setdefault(owner_of(steps), []).append(steps)
    return [_summarize(owner, steps, world_size) for owner, steps in by_owner.items()]


def owner_of(steps: Mapping[int, Step]) -> int:
    """Returns the number of the model that ranks took a step with.

    Args:
        steps: the step by rank.
    """
    return next(iter(steps.values())).owner


def _summarize(
    owner: int, together: Sequence[Mapping[int, Step]], world_size: int | None
) -> ModelSummary:
    every = [step for steps in together for step in steps.values()]
    is_any_whole = any(step.begin is not None for step in every)
    parts: dict[int, list[dict[Part, int]]] = {}
    averages: list[dict[Part, float]] = []
    for steps in together:
        whole = {rank: s for rank, s in steps.items() if s.begin is not None or not is_any_whole}
        by_rank = {rank: parts_of(step) for rank, step in whole.items()}
        for rank, of_rank in by_rank.items():
            parts.setdefault(rank, []).append(of_rank)
        if by_rank:
            averages.append(average(list(by_rank.values())))
    lasts = [find_last(steps, world_size) for steps in together]
    return ModelSummary(
        owner=owner,
        first=min(step.number for step in every),
        last=max(step.number for step in every),
        ranks={rank: _durations(steps) for rank, steps in sorted(parts.items())},
        average=_durations(averages),
        lasts=_last_ranks([last for last in lasts if last is not None and last.by > 0]),
        tells_lateness=any(map(tells_lateness, every)),
    )


def average(ranks: Sequence[Mapping[Part, int]]) -> dict[Part, float]:
    """Returns how long the parts of a step took on the average of the ranks, in nanoseconds.

    Args:
        ranks: the parts of the step on each rank, at least one.
    """
    return {part: sum(parts[part] for parts in ranks) / len(ranks) for part in Part}


def _durations(steps: Sequence[Mapping[Part, float]]) -> Durations:
    figures = {
        part: figure([step[part] for step in steps])
        for part in Part
        if any(step[part] for step in steps)
    }
    return Durations(figure([sum(step.values()) for step in steps]), figures, len(steps))


def _last_ranks(lasts: Sequence[Last]) -> list[LastRank]:
    result = []
    for rank in {last.rank for last in lasts}:
        mine = [last for last in lasts if last.rank == rank]
        result.append(
            LastRank(
                rank=rank,
                num_last=len(mine),
                share=len(mine) / len(lasts),
                by=median(last.by for last in mine) / 1e6,
                total=sum(last.by for last in mine) / 1e6,
                before_forward=_median_ms([last.before_forward for last in mine]),
                in_forward=_median_ms([last.in_forward for last in mine]),
                in_backward=_median_ms([last.in_backward for last in mine]),
            )
        )
    return sorted(result, key=lambda last: -last.total)


def _median_ms(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) / 1e6 if known else None
