"""What the events of one process tell: training steps and what is in them. Times are nanoseconds.

A step of a model is a round, that is a synchronised backward, and what led to it: it begins where
the step before it ended, and ends with its round or with the optimizer steps that follow the round.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastddp.timeline.spans import Span


@dataclass(slots=True)
class Launch:
    """A collective of a round, as the reducer sees it."""

    number: int
    """Its number in the round."""
    at: int
    num_bytes: int
    fill: int | None = None
    """When copying into its bucket began; None if nothing was left to copy."""
    wait: Span | None = None
    """While the reducer waited for it."""
    met: int | None = None
    """When the last rank launched it; None until the recordings of several ranks are compared."""


@dataclass(slots=True)
class Meeting:
    """A collective in shared memory, as the transport sees it."""

    key: int
    """Its number in its group and the group's number: the same on all ranks."""
    owner: int
    begin: int
    """When this rank came."""
    num_bytes: int
    met: int | None = None
    """When all ranks had come."""
    end: int | None = None
    last_rank: int | None = None
    spread: int = 0
    """How many nanoseconds the last rank came after the first."""


@dataclass(slots=True)
class Step:
    """A step of one model on one rank. Times are nanoseconds."""

    owner: int
    number: int
    begin: int | None
    """When what was before it ended; None for the first step that is known."""
    forward: int
    """When the last forward before the round began."""
    backward: int
    """When backward reached the model: the round began."""
    backward_end: int
    """When this rank had all gradients; what follows is exposed communication."""
    end_of_round: int
    forwards: list[Span] = field(default_factory=list)
    """Earlier forwards of the step, without a round: accumulation or evaluation."""
    optimizer: list[Span] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    """Collectives in shared memory from the begin of the step on, also those of the script."""

    @property
    def group(self) -> int | None:
        """The number of the group that the round was in, where shared memory tells it."""
        of_round = (m for m in self.meetings if m.owner == self.owner and m.begin >= self.backward)
        return next((meeting.key >> 32 for meeting in of_round), None)

    @property
    def end(self) -> int:
        """When the step ended: after the optimizer, if one followed the round."""
        return self.optimizer[-1].end if self.optimizer else self.end_of_round


@dataclass(slots=True)
class Stall:
    """A time in which the process waited for another rank long enough to say so."""

    rank: int
    """The rank at fault."""
    begin: int
    end: int | None
    """None if it had not ended when the recording did."""


@dataclass(slots=True)
class Recording:
    """All that the events of one process tell."""

    steps: list[Step] = field(default_factory=list)
    """Whole steps in the order in which their rounds ended."""
    unfinished: list[Step] = field(default_factory=list)
    """Rounds that had begun and not ended, with the end of the recording as the end."""
    stalls: list[Stall] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    """When waits ended with an error."""
    interrupted: list[int] = field(default_factory=list)
    """When waits were interrupted by a signal."""
    first: int = 0
    last: int = 0
    """The times of the first and the last event."""
    doing: str = ""
    """What the process was at when the recording ended, such as ``in the backward of step 3``."""
