"""Notes of a report: which recordings it is about, what went wrong, and what its times rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastddp.timeline.run import Run
from fastddp.timeline.summary import ModelSummary
from fastddp.timeline.wording import count, in_ms

EARLY_END_S = 1.0
"""How much earlier than the others' a recording ends, if that is pointed out."""
MOST_NOTES = 8
"""How many sentences there are about the same kind of thing."""


def headline(run: Run, models: Sequence[ModelSummary]) -> str:
    """Returns which ranks and steps a report is about, in a line.

    Args:
        run: the recordings of the run.
        models: the summaries of the models that were trained.
    """
    there = len(run.rings)
    ranks = count(there, "rank")
    if there == 1:
        ranks = f"rank {next(iter(run.rings))}"
    if run.world_size is not None and run.world_size > there:
        ranks += f" of {run.world_size}"
    recordings = [recording for recording in run.recordings.values() if recording.last]
    if not recordings:
        return f"{ranks}: no events"
    seconds = (max(r.last for r in recordings) - min(r.first for r in recordings)) / 1e9
    hosts = f" on {count(len(run.hosts), 'host')}" if there > 1 else ""
    steps = "no step that is whole"
    if len(models) == 1:
        steps = f"steps {models[0].first} to {models[0].last}"
    elif models:
        steps = f"{len(models)} models"
    return f"{ranks}{hosts}, {steps}, the latest {seconds:.1f} s"


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
        yield f"There is no recording of {count(len(run.missing), 'rank')}: {names}."


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
            yield f"The clock of {ranks} is known to within {in_ms(error)} ms of the first host's."


def _left_out(run: Run) -> Iterator[str]:
    for text in run.left_out:
        yield f"Left out: {text}."
