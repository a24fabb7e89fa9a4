"""The tables of a report, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastddp.timeline.figures import Figure
from fastddp.timeline.parts import Part
from fastddp.timeline.summary import Durations, ModelSummary
from fastddp.timeline.wording import in_ms

MOST_RANKS = 16
"""How many ranks get a row each in a table."""


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows, all of them texts already. The first column says what the row is about."""

    columns: list[str]
    rows: list[list[str]]


def title(model: ModelSummary, models: Sequence[ModelSummary]) -> str:
    """Returns how a model is called where there are several; an empty text for the only one.

    Args:
        model: the model to be called something.
        models: all models of the report.
    """
    if len(models) == 1:
        return ""
    return f"model {models.index(model) + 1} (steps {model.first} to {model.last})"


def tables(model: ModelSummary) -> list[Table]:
    """Returns the figures of the average of the ranks, then those of each rank.

    Args:
        model: the summary of a model.
    """
    head = "milliseconds" if len(model.ranks) == 1 else "milliseconds, average of the ranks"
    rows = [_row("step", model.average.step)]
    rows += [_row(_name(part, model), f) for part, f in model.average.parts.items()]
    result = [Table([head, "median", "p95", "trend"], rows)]
    if len(model.ranks) > 1:
        parts = list(model.average.parts)
        result.append(
            Table(
                ["median, ms", "step", *(_name(part, model) for part in parts)],
                [_row_of_rank(rank, model.ranks[rank], parts) for rank in shown_ranks(model)],
            )
        )
    return result


def shown_ranks(model: ModelSummary) -> list[int]:
    """Returns the ranks that get a place: all, or those that were last and then the first ones.

    Args:
        model: the summary of a model.
    """
    if len(model.ranks) <= MOST_RANKS:
        return sorted(model.ranks)
    late = [last.rank for last in model.lasts if last.rank in model.ranks]
    return sorted(list(dict.fromkeys([*late[: MOST_RANKS // 2], *model.ranks]))[:MOST_RANKS])


def _name(part: Part, model: ModelSummary) -> str:
    if part is Part.TRANSFER and not model.tells_lateness:
        return "exposed communication"
    return part.value


def _row(name: str, figure: Figure) -> list[str]:
    trend = ""
    if figure.trend is not None:
        trend = in_ms(abs(figure.trend))
        if trend != "0":
            trend = ("-" if figure.trend < 0 else "+") + trend
    return [name, in_ms(figure.median), in_ms(figure.p95), trend]


def _row_of_rank(rank: int, durations: Durations, parts: Sequence[Part]) -> list[str]:
    figures = [durations.step, *(durations.parts.get(part) for part in parts)]
    return [f"rank {rank}", *("0" if f is None else in_ms(f.median) for f in figures)]
