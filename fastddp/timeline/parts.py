"""What a step consists of, and how long each part took on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from fastddp.timeline.spans import Span, covered, merged
from fastddp.timeline.steps import Step


class Part(Enum):
    """A part of a step, by the name that tables call it. Together they are the whole step."""

    OTHER = "other"
    """Outside of all the others: the data loader, logging, clipping, what the script does."""
    EARLIER = "earlier forwards"
    """Forwards without a round and what follows them: accumulation, evaluation."""
    FORWARD = "forward"
    """From the begin of the forward until backward reaches the model; the loss is in it."""
    BACKWARD = "backward"
    """From there until this rank has all gradients."""
    LATE = "waiting for late ranks"
    """Exposed communication during which a rank had not come yet."""
    TRANSFER = "transfer"
    """Exposed communication while all ranks were there."""
    OPTIMIZER = "optimizer"


def parts_of(step: Step, last_launches: Mapping[int, int] | None = None) -> dict[Part, int]:
    """Returns the nanoseconds of each part of a step; they add up to the step.

    Waiting for late ranks is what would be left of exposed communication if a transfer took no
    time: the time in which a collective of the round had been begun here and not on all ranks.

    Args:
        step: the step of one rank. If it is not known when the step began, it begins with its
            forward here.
        last_launches: when the last rank launched a collective of this round, by number, on the
            clock of the step; for transports that do not tell when the ranks met.
    """
    exposed = step.exposed
    late = covered(late_spans(step, last_launches))
    first = min([step.forward, *(span.begin for span in step.forwards)])
    optimizer = covered(step.optimizer)
    begin = first if step.begin is None else min(step.begin, first)
    known = {
        Part.EARLIER: step.forward - first,
        Part.FORWARD: step.backward - step.forward,
        Part.BACKWARD: step.backward_end - step.backward,
        Part.LATE: late,
        Part.TRANSFER: exposed.length - late,
        Part.OPTIMIZER: optimizer,
    }
    return {Part.OTHER: step.end - begin - sum(known.values()), **known}


def late_spans(step: Step, last_launches: Mapping[int, int] | None = None) -> list[Span]:
    """Returns the times, without overlap, in which a rank waited for late ranks and did nothing.

    Args:
        step: the step of the rank that waited.
        last_launches: when the last rank launched each collective, as for :func:`parts_of`.
    """
    return merged(span.within(step.exposed) for span in _absences(step, last_launches or {}))


def _absences(step: Step, last_launches: Mapping[int, int]) -> list[Span]:
    """Returns when a rank was missing in a collective of the round that had begun here."""
    met = [Span(m.begin, m.met) for m in step.meetings if m.met is not None]
    launched = [
        Span(launch.at, last_launches[launch.number])
        for launch in step.launches
        if launch.number in last_launches
    ]
    return met + launched


def tells_lateness(step: Step, last_launches: Mapping[int, int] | None = None) -> bool:
    """Returns whether it is known how much of the exposed communication is due to late ranks.

    Args:
        step: the step of one rank.
        last_launches: when the last rank launched each collective, as for :func:`parts_of`.
    """
    return bool(last_launches) or any(m.met is not None for m in step.meetings)
