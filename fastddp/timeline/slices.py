"""What a rank did when, as slices in lanes: for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from fastddp.timeline.parts import exposed_spans, late_spans
from fastddp.timeline.recording import Recording, Step
from fastddp.timeline.spans import Span, gaps


class Lane(Enum):
    """Where a slice is drawn; by the name of the lane."""

    COMPUTE = "compute"
    COPY = "copy"
    COLLECTIVE = "collective"
    EXPOSED = "exposed wait"
    OPTIMIZER = "optimizer"
    TROUBLE = "stalls and errors"


class Activity(Enum):
    """What a slice shows; by the name that a legend gives it."""

    FORWARD = "forward"
    EARLIER = "forward without a round"
    BACKWARD = "backward"
    COPY = "copy"
    GATHERING = "collective: a rank is missing"
    COLLECTIVE = "collective"
    LATE = "exposed: waiting for late ranks"
    TRANSFER = "exposed: transfer"
    OPTIMIZER = "optimizer"
    STALL = "stall"


LANES = {
    Activity.FORWARD: Lane.COMPUTE,
    Activity.EARLIER: Lane.COMPUTE,
    Activity.BACKWARD: Lane.COMPUTE,
    Activity.COPY: Lane.COPY,
    Activity.GATHERING: Lane.COLLECTIVE,
    Activity.COLLECTIVE: Lane.COLLECTIVE,
    Activity.LATE: Lane.EXPOSED,
    Activity.TRANSFER: Lane.EXPOSED,
    Activity.OPTIMIZER: Lane.OPTIMIZER,
    Activity.STALL: Lane.TROUBLE,
}


@dataclass(frozen=True, slots=True)
class Slice:
    """A time in which a rank did one thing."""

    activity: Activity
    span: Span
    facts: dict[str, int]
    """What else is known of it, such as the number of the step or the bytes of a collective."""


def slices_of(recording: Recording) -> Iterator[Slice]:
    """Yields the slices of a rank, step by step.

    Args:
        recording: what the rank did.
    """
    for step in [*recording.steps, *recording.unfinished]:
        for activity, span, facts in _of_step(step):
            if span.length:
                yield Slice(activity, span, {"step": step.number, **facts})
    for stall in recording.stalls:
        end = recording.last if stall.end is None else stall.end
        yield Slice(Activity.STALL, Span(stall.begin, end), {"rank at fault": stall.rank})


def _of_step(step: Step) -> Iterator[tuple[Activity, Span, dict[str, int]]]:
    yield from ((Activity.EARLIER, span, {}) for span in step.forwards)
    yield Activity.FORWARD, Span(step.forward, step.backward), {}
    yield Activity.BACKWARD, Span(step.backward, step.backward_end), {}
    for launch in step.launches:
        if launch.fill is not None:
            yield Activity.COPY, Span(launch.fill, launch.at), {"collective": launch.number}
    yield from _collectives(step)
    late = late_spans(step)
    yield from ((Activity.LATE, span, {}) for span in late)
    for exposed in exposed_spans(step):
        yield from ((Activity.TRANSFER, span, {}) for span in gaps(late, exposed))
    yield from ((Activity.OPTIMIZER, span, {}) for span in step.optimizer)


def _collectives(step: Step) -> Iterator[tuple[Activity, Span, dict[str, int]]]:
    """Yields the collectives as the transport saw them, or else as the reducer did."""
    for meeting in step.meetings:
        facts = {"bytes": meeting.num_bytes}
        end = step.end_of_round if meeting.end is None else meeting.end
        met = end if meeting.met is None else meeting.met
        if meeting.last_rank is not None:
            facts |= {"last rank": meeting.last_rank, "later by ns": meeting.spread}
        yield Activity.GATHERING, Span(meeting.begin, met), facts
        yield Activity.COLLECTIVE, Span(met, end), facts
    if any(meeting.begin >= step.backward for meeting in step.meetings):
        return
    for launch in step.launches:
        end = step.end_of_round if launch.wait is None else launch.wait.end
        facts = {"collective": launch.number, "bytes": launch.num_bytes}
        yield Activity.COLLECTIVE, Span(launch.at, end), facts
