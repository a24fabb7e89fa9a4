"""Training steps of one process, out of its events.

Events may be missing, where the ring has overwritten them, a round was abandoned or the process
died; what is then not whole does not become a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastddp.timeline.recording import Launch, Meeting, Recording, Stall, Step
from fastddp.timeline.spans import Span
from fastddp.watch.events import Kind
from fastddp.watch.ring_reader import Event


@dataclass(slots=True)
class _Model:
    """What is known of a model's step that is not whole yet."""

    forwards: list[Span] = field(default_factory=list)
    forward: int | None = None
    """When the latest forward began."""
    begin: int | None = None
    """When what was before that forward had ended."""
    round: Step | None = None
    has_failed: bool = False
    """Whether the round under way has met an error: it takes what time it takes."""
    fills: dict[int, int] = field(default_factory=dict)
    waits: dict[int, int] = field(default_factory=dict)


class _Reading:
    """Goes through the events of one process once."""

    def __init__(self) -> None:
        self.result = Recording()
        self._models: dict[int, _Model] = {}
        self._end: int | None = None  # of the latest round or optimizer step
        self._optimizer: int | None = None  # when the one under way began
        self._meetings: dict[int, Meeting] = {}  # by key, those that have not ended
        self._recent: list[Meeting] = []  # since the latest step ended
        self._is_between = False  # since a round has ended no other has begun

    def take(self, event: Event) -> None:
        kind = event.kind
        self.result.first = self.result.first or event.at
        self.result.last = event.at
        if kind in (Kind.COLLECTIVE_BEGIN, Kind.COLLECTIVE_MET, Kind.COLLECTIVE_END):
            self._take_meeting(event)
        elif kind in (Kind.OPTIMIZER_BEGIN, Kind.OPTIMIZER_END):
            self._take_optimizer(event)
        elif kind in (Kind.STALL_BEGIN, Kind.STALL_END):
            self._take_stall(event)
        elif kind is Kind.ERROR:
            self._take_error(event)
        elif kind is Kind.INTERRUPTED:
            self.result.interrupted.append(event.at)
        else:
            self._take_model(event, self._models.setdefault(event.owner, _Model()))

    def _take_error(self, event: Event) -> None:
        self.result.errors.append(event.at)
        self._meetings.pop(event.a, None)
        steps = self.result.steps
        if event.owner in self._models:
            self._models[event.owner].has_failed = True
        if self._is_between and steps[-1].owner == event.owner and not steps[-1].optimizer:
            steps.pop()  # its round has ended with this error
            self._is_between = False

    def _take_model(self, event: Event, model: _Model) -> None:
        current = model.round
        if event.kind is Kind.FORWARD_BEGIN:
            model.forward, model.begin = event.at, self._end
            self._is_between = False
        elif event.kind is Kind.FORWARD_END:
            if model.forward is not None:
                model.forwards.append(Span(model.forward, event.at))
        elif event.kind is Kind.ROUND_BEGIN:
            self._begin_round(event, model)
        elif current is None:
            pass  # of a round that began before the recording
        elif event.kind is Kind.BACKWARD_END:
            current.backward_end = event.at
        elif event.kind is Kind.FILL_BEGIN:
            model.fills[event.a] = event.at
        elif event.kind is Kind.LAUNCH:
            fill = model.fills.pop(event.a, None)
            current.launches.append(Launch(event.a, event.at, event.b, fill))
        elif event.kind is Kind.WAIT_BEGIN:
            model.waits[event.a] = event.at
        elif event.kind is Kind.WAIT_END:
            self._end_wait(event, model, current)
        elif event.kind is Kind.ROUND_END:
            self._end_round(event, model, current)

    def _begin_round(self, event: Event, model: _Model) -> None:
        # Without a forward if a method of the model was called in its place.
        forward, begin = event.at, self._end
        if model.forward is not None:
            forward, begin = model.forward, model.begin
        model.forwards = [span for span in model.forwards if span.begin < forward]
        model.fills, model.waits, model.has_failed = {}, {}, False
        model.round = Step(
            owner=event.owner,
            number=event.a,
            begin=begin,
            forward=forward,
            backward=event.at,
            backward_end=0,
            end_of_round=0,
            forwards=model.forwards,
        )
        self._is_between = False

    @staticmethod
    def _end_wait(event: Event, model: _Model, current: Step) -> None:
        begin = model.waits.pop(event.a, None)
        for launch in current.launches:
            if launch.number == event.a and begin is not None:
                launch.wait = Span(begin, event.at)

    def _end_round(self, event: Event, model: _Model, current: Step) -> None:
        current.end_of_round = event.at
        if not current.backward_end:  # then backward ended when waiting began, at the latest
            begun = [launch.wait.begin for launch in current.launches if launch.wait]
            current.backward_end = min(begun, default=event.at)
        current.meetings, self._recent = self._recent, []
        if not model.has_failed:
            self.result.steps.append(current)
        self._models[event.owner] = _Model()
        self._end = event.at
        self._is_between = not model.has_failed

    def _take_optimizer(self, event: Event) -> None:
        if event.kind is Kind.OPTIMIZER_BEGIN:
            self._optimizer = event.at
        elif self._optimizer is not None:
            if self._is_between:
                step = self.result.steps[-1]  # of which it is no part if it began in backward
                step.optimizer.append(Span(max(self._optimizer, step.end_of_round), event.at))
                self._end = event.at
            self._optimizer = None

    def _take_meeting(self, event: Event) -> None:
        if event.kind is Kind.COLLECTIVE_BEGIN:
            meeting = Meeting(event.a, event.owner, event.at, event.b & (1 << 56) - 1)
            self._meetings[event.a] = meeting
            self._recent.append(meeting)
            return
        known = self._meetings.get(event.a)
        if known is None:
            return  # it began before the recording
        if event.kind is Kind.COLLECTIVE_MET:
            known.met = event.at
            known.last_rank, known.spread = event.b >> 40, event.b & (1 << 40) - 1
        else:
            known.end = event.at
            del self._meetings[event.a]

    def _take_stall(self, event: Event) -> None:
        """Notes a stall, which is told of only when it has lasted for a while."""
        if event.kind is Kind.STALL_BEGIN:
            self.result.stalls.append(Stall(event.a, event.at, None))
            return
        under_way = [stall for stall in self.result.stalls if stall.end is None]
        same = [stall for stall in under_way if stall.rank == event.a]
        if not under_way:
            self.result.stalls.append(Stall(event.a, event.at, event.at))
        stall = (same or under_way or self.result.stalls)[-1]
        # At the end it is known better which rank it was, and when the wait began.
        stall.rank, stall.end = event.a, event.at
        stall.begin = min(stall.begin, max(self.result.first, event.at - event.b))

    def finish(self) -> Recording:
        self.result.doing = self._doing()
        for model in self._models.values():
            if model.round is not None:
                model.round.backward_end = model.round.backward_end or self.result.last
                model.round.end_of_round = self.result.last
                model.round.meetings = [m for m in self._recent if m.owner == model.round.owner]
                self.result.unfinished.append(model.round)
        return self.result

    def _doing(self) -> str:
        after = f"after step {self.result.steps[-1].number}" if self.result.steps else ""
        if self._optimizer is not None:
            return f"in an optimizer step {after}".rstrip()
        for model in self._models.values():
            if model.round is not None and model.round.backward_end:
                return f"waiting for the communication of step {model.round.number}"
            if model.round is not None:
                return f"in the backward of step {model.round.number}"
        for model in self._models.values():
            if model.forward is not None:
                is_over = model.forwards and model.forwards[-1].begin == model.forward
                what = "between a forward and its backward" if is_over else "in a forward"
                return f"{what}, {after}".rstrip(", ")
        return f"between steps, {after}" if after else "before the first step"


def read_steps(events: Iterable[Event]) -> Recording:
    """Returns the steps of one process.

    Args:
        events: the events of the process by time.
    """
    reading = _Reading()
    for event in events:
        reading.take(event)
    return reading.finish()
