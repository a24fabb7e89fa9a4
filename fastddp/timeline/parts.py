"""What a step consists of, and how long each part took on one rank."""

from __future__ import annotations

from enum import Enum

from fastddp.timeline.recording import Step
from fastddp.timeline.spans import Span, covered, gaps, merged


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


def parts_of(step: Step) -> dict[Part, int]:
    """Returns the nanoseconds of each part of a step; they add up to the step.

    Exposed is the communication that this rank waits for while it does nothing else: from the end
    of its backward to the end of the round, and in its forward while the model's buffers are made
    equal. Waiting for late ranks is what would be left of that if a transfer took no time.

    Args:
        step: the step of one rank. If it is not known when the step began, it begins with its
            forward here.
    """
    first = min([step.forward, *(span.begin for span in step.forwards)])
    begin = first if step.begin is None else min(step.begin, first)
    exposed = exposed_spans(step)
    late = covered(late_spans(step))
    forward = Span(step.forward, step.backward)
    known = {
        Part.EARLIER: step.forward - first,
        Part.FORWARD: covered(gaps(exposed, forward)),
        Part.BACKWARD: step.backward_end - step.backward,
        Part.LATE: late,
        Part.TRANSFER: covered(exposed) - late,
        Part.OPTIMIZER: covered(step.optimizer),
    }
    return {Part.OTHER: step.end - begin - sum(known.values()), **known}


def exposed_spans(step: Step) -> list[Span]:
    """Returns the times, without overlap, in which a rank only waited for communication.

    Args:
        step: the step of the rank that waited.
    """
    forward = Span(step.forward, step.backward)
    in_forward = [
        Span(meeting.begin, meeting.end).within(forward)
        for meeting in step.meetings
        if meeting.owner == step.owner and meeting.end is not None
    ]
    return merged([*in_forward, Span(step.backward_end, step.end_of_round)])


def late_spans(step: Step) -> list[Span]:
    """Returns the times, without overlap, in which a rank only waited for late ranks.

    Those are the ones in which it had begun a collective that another rank had not.

    Args:
        step: the step of the rank that waited.
    """
    absences = [Span(m.begin, m.met) for m in step.meetings if m.met is not None]
    absences += [Span(x.at, x.met) for x in step.launches if x.met is not None]
    return merged(each.within(outer) for outer in exposed_spans(step) for each in merged(absences))


def tells_lateness(step: Step) -> bool:
    """Returns whether it is known how much of the exposed communication is due to late ranks.

    Args:
        step: the step of one rank.
    """
    if any(meeting.met is not None for meeting in step.meetings):
        return True
    return any(launch.met is not None for launch in step.launches)
