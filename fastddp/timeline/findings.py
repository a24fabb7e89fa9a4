"""What a report says: tables and sentences, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastddp.timeline.figures import Figure
from fastddp.timeline.parts import Part
from fastddp.timeline.run import Run
from fastddp.timeline.summary import Durations, LastRank, ModelSummary

MOST_RANKS = 16
"""How many ranks get a row each in a table."""
MOST_LAST = 3
"""How many of the ranks that were last are named."""
WORTH_NAMING = 0.01
"""The least share of the steps' time that a late rank costs, if it is named."""
EARLY_END_S = 1.0
"""How much earlier than the others' a recording ends, if that is pointed out."""
MOST_NOTES = 8


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows, all of them texts already. The first column says what the row is about."""

    columns: list[str]
    rows: list[list[str]]


def headline(run: Run, models: Sequence[ModelSummary]) -> str:
    """Returns which ranks and steps a report is about, in a line.

    Args:
        run: the recordings of the run.
        models: the summaries of the models that were trained.
    """
    there = len(run.rings)
    ranks = _count(there, "rank")
    if there == 1:
        ranks = f"rank {next(iter(run.rings))}"
    if run.world_size is not None and run.world_size > there:
        ranks += f" of {run.world_size}"
    recordings = [recording for recording in run.recordings.values() if recording.last]
    if not recordings:
        return f"{ranks}: no events"
    seconds = (max(r.last for r in recordings) - min(r.first for r in recordings)) / 1e9
    hosts = f" on {_count(len(run.hosts), 'host')}" if there > 1 else ""
    steps = "no step that is whole"
    if len(models) == 1:
        steps = f"steps {models[0].first} to {models[0].last}"
    elif models:
        steps = f"{len(models)} models"
    return f"{ranks}{hosts}, {steps}, the latest {seconds:.1f} s"


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
        trend = _ms(abs(figure.trend))
        if trend != "0":
            trend = ("-" if figure.trend < 0 else "+") + trend
    return [name, _ms(figure.median), _ms(figure.p95), trend]


def _row_of_rank(rank: int, durations: Durations, parts: Sequence[Part]) -> list[str]:
    figures = [durations.step, *(durations.parts.get(part) for part in parts)]
    return [f"rank {rank}", *("0" if f is None else _ms(f.median) for f in figures)]


def _ms(milliseconds: float) -> str:
    """Returns a duration with three digits, or as many as it has before the point."""
    if milliseconds < 0.005:
        return "0"
    if milliseconds >= 99.95:
        return f"{milliseconds:.0f}"
    return f"{milliseconds:.1f}" if milliseconds >= 9.995 else f"{milliseconds:.2f}"


def what_could_be_saved(model: ModelSummary, world_size: int | None) -> list[str]:
    """Returns a sentence with bounds for what faster communication could save, and even ranks.

    Args:
        model: the summary of a model.
        world_size: the number of ranks that there are; None if it is not known.
    """
    if world_size == 1:
        return []

    def most(part: Part) -> str:
        waits = [of.parts[part].median for of in model.ranks.values() if part in of.parts]
        share = max(waits, default=0.0) / (model.average.step.median or 1.0)
        return f"{_ms(max(waits, default=0.0))} ms ({100 * share:.1f} %)"

    text = f"A step would be at most {most(Part.TRANSFER)} shorter if communication took no time"
    if model.tells_lateness:
        text += f", and at most {most(Part.LATE)} if no rank was late"
    return [text + "."]


def who_was_last(model: ModelSummary, world_size: int | None) -> list[str]:
    """Returns sentences that name the ranks that kept the others waiting.

    Args:
        model: the summary of a model.
        world_size: the number of ranks that there are; None if it is not known.
    """
    if world_size == 1:
        return []
    if not model.lasts:
        return [
            "Which rank was last is not known from one rank: python -m fastddp report DIRECTORY"
            " compares the recordings of all."
        ]
    time = model.average.step.median * sum(last.num_last for last in model.lasts)
    worth = [last for last in model.lasts if last.total > WORTH_NAMING * time][:MOST_LAST]
    if not worth:
        worst = model.lasts[0]
        return [
            "No rank was late to speak of: the last one to come costs less than"
            f" {100 * WORTH_NAMING:.0f} % of a step (rank {worst.rank} most often costs time, by"
            f" {_ms(worst.by)} ms at the median)."
        ]
    return [_sentence(last) for last in worth]


def _sentence(last: LastRank) -> str:
    text = f"Rank {last.rank} was last in {100 * last.share:.0f} % of steps, by {_ms(last.by)} ms"
    text += " at the median"
    causes = {
        "before its forward began": last.before_forward,
        "in its forward": last.in_forward,
        "in its backward": last.in_backward,
    }
    known = {text: ms for text, ms in causes.items() if ms is not None}
    if not known:
        return text + "."
    cause = max(known, key=lambda text: known[text])
    return f"{text}; {_ms(max(0, min(known[cause], last.by)))} ms of that {cause}."


def notes(run: Run) -> list[str]:
    """Returns sentences about what went wrong, and about what the figures rest on.

    Args:
        run: the recordings of the run.
    """
    kinds = (_stalls(run), _errors(run), _ends(run), _missing(run), _clocks(run), _left_out(run))
    return [line for kind in kinds for line in _few(list(kind))]


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - MOST_NOTES
    return lines if more <= 0 else [*lines[:MOST_NOTES], f"... and {more} more of this kind."]


def _stalls(run: Run) -> Iterator[str]:
    by_rank: dict[int, list[float]] = {}
    for recording in run.recordings.values():
        for stall in recording.stalls:
            end = recording.last if stall.end is None else stall.end
            by_rank.setdefault(stall.rank, []).append((end - stall.begin) / 1e9)
    for rank, seconds in sorted(by_rank.items(), key=lambda item: -max(item[1])):
        times = "once" if len(seconds) == 1 else f"{len(seconds)} times"
        yield f"Rank {rank} was waited for {times} as a stall, at most {max(seconds):.1f} s."


def _errors(run: Run) -> Iterator[str]:
    for rank, recording in run.recordings.items():
        for what, times in (("an error", recording.errors), ("a signal", recording.interrupted)):
            if times:
                ago = (_end(run) - times[0]) / 1e9
                yield (
                    f"Rank {rank}: a wait ended with {what}, first {ago:.1f} s before the end of"
                    " the recordings."
                )


def _ends(run: Run) -> Iterator[str]:
    """Says where a rank was that has stopped recording before the others, or without their error.

    A rank that was killed is among these: the others got an error, and it could not.
    """
    is_broken = any(recording.errors for recording in run.recordings.values())
    for rank, recording in run.recordings.items():
        early = (_end(run) - recording.last) / 1e9
        if not recording.last:
            yield f"Rank {rank} has recorded nothing."
        elif early >= EARLY_END_S or (is_broken and not recording.errors):
            when = f"{early:.1f} s before the last one" if early else "last"
            yield f"The recording of rank {rank} ends {when}, {recording.doing}."


def _end(run: Run) -> int:
    return max(recording.last for recording in run.recordings.values())


def _missing(run: Run) -> Iterator[str]:
    if len(run.rings) > 1 and run.missing:
        names = ", ".join(map(str, run.missing[:MOST_NOTES]))
        names += ", ..." if len(run.missing) > MOST_NOTES else ""
        yield f"There is no recording of {_count(len(run.missing), 'rank')}: {names}."


def _clocks(run: Run) -> Iterator[str]:
    for host in run.hosts[1:]:
        ranks = f"the host of rank {host.ranks[0]}"
        if host.shift.error_ns is None:
            yield (
                f"The times of {ranks} rest on the hosts' dates alone: they are wrong by as much"
                " as these."
            )
        else:
            error = host.shift.error_ns / 1e6
            yield f"The clock of {ranks} is known to within {_ms(error)} ms of the first host's."


def _left_out(run: Run) -> Iterator[str]:
    for text in run.left_out:
        yield f"Left out: {text}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
