"""Steps of several ranks, matched, and which rank came last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastddp.timeline.recording import Meeting, Recording, Step

Key = tuple[int, int]
"""A model's number and a step's number."""


def match(recordings: Mapping[int, Recording]) -> list[dict[int, Step]]:
    """Returns the steps that ranks took together, each by rank, in the order in which they ended.

    Args:
        recordings: what the ranks did, by rank, on one clock.
    """
    by_key: dict[Key, dict[int, Step]] = {}
    for rank, recording in recordings.items():
        for step in recording.steps:
            by_key.setdefault((step.owner, step.number), {})[rank] = step
    together = [steps for same in by_key.values() for steps in _by_group(same)]
    return sorted(together, key=lambda steps: max(step.end_of_round for step in steps.values()))


def _by_group(steps: dict[int, Step]) -> list[dict[int, Step]]:
    """Divides ranks that have wrapped a model in groups of their own, as shared memory tells.

    Models have the same number in all groups that have none of their ranks in common.
    """
    groups = {rank: step.group for rank, step in steps.items()}
    if len(set(groups.values()) - {None}) < 2:
        return [steps]
    return [
        {rank: step for rank, step in steps.items() if groups[rank] == group}
        for group in dict.fromkeys(groups.values())
    ]


def note_launches(steps: Mapping[int, Step]) -> None:
    """Notes in each launch of a step when the last rank launched the same collective.

    Args:
        steps: the same step of several ranks. With only one there is nothing to compare.
    """
    if len(steps) < 2:
        return
    last: dict[int, int] = {}
    for step in steps.values():
        for launch in step.launches:
            last[launch.number] = max(last.get(launch.number, 0), launch.at)
    for step in steps.values():
        for launch in step.launches:
            launch.met = last[launch.number]


@dataclass(frozen=True, slots=True)
class Last:
    """Which rank was the last one in a step; times in nanoseconds.

    The last three attributes add up to the first two's difference from the rank that was first,
    and are None where the recording of one of these two ranks is missing.
    """

    rank: int
    by: int
    """How much later it came than the first rank."""
    before_forward: int | None = None
    """How much of that it was late when its forward began."""
    in_forward: int | None = None
    """How much more its forward took."""
    in_backward: int | None = None
    """How much more its backward took."""


def find_last(steps: Mapping[int, Step], world_size: int | None) -> Last | None:
    """Returns which rank kept the others waiting in a step; None where nothing tells.

    The ranks come together when all have their gradients, and, in shared memory, in collectives
    before the round: a broadcast of buffers, or the script's own. The one in which the last rank
    came latest counts.

    Args:
        steps: the same step of the ranks whose recordings are known, on one clock.
        world_size: the number of ranks that there are; None if it is not known.
    """
    found = []
    if len(steps) > 1:
        found.append(_last_of_backward(steps))
    is_complete = len(steps) == world_size
    for step in steps.values():
        found += [_last_of(meeting, steps) for meeting in _before_round(step)]
        if not is_complete:  # the last one may be a rank that is not among these
            found += [_last_of(meeting, steps) for meeting in _of_round(step)]
    return max(found, key=lambda last: last.by, default=None)


def _last_of_backward(steps: Mapping[int, Step]) -> Last:
    first = min(steps, key=lambda rank: steps[rank].backward_end)
    last = max(steps, key=lambda rank: steps[rank].backward_end)
    mine, other = steps[last], steps[first]
    before = mine.forward - other.forward
    in_forward = (mine.backward - mine.forward) - (other.backward - other.forward)
    by = mine.backward_end - other.backward_end
    return Last(last, by, before, in_forward, by - before - in_forward)


def _last_of(meeting: Meeting, steps: Mapping[int, Step]) -> Last:
    assert meeting.last_rank is not None
    begun = {rank: m for rank, step in steps.items() for m in step.meetings if m.key == meeting.key}
    # The event has the rank in its group. But the last one records that all have met when it comes.
    itself = [rank for rank, m in begun.items() if m.met == m.begin]
    last, by = itself[0] if itself else meeting.last_rank, meeting.spread
    others = [rank for rank in begun if rank != last]
    if last not in steps or not others:
        return Last(last, by)
    first = min(others, key=lambda rank: begun[rank].begin)
    if meeting.begin < steps[first].forward:
        return Last(last, by, by, 0, 0)
    before = min(by, max(0, steps[last].forward - steps[first].forward))
    return Last(last, by, before, by - before, 0)


def _before_round(step: Step) -> Iterator[Meeting]:
    for meeting in step.meetings:
        if meeting.met is not None and meeting.begin < step.backward:
            yield meeting


def _of_round(step: Step) -> list[Meeting]:
    """Returns the meetings of a round that its rank had to wait for, or else the last one.

    Those that met while backward went on cost nothing: another thread carried them out.
    """
    met = [m for m in step.meetings if m.met is not None and m.begin >= step.backward]
    waited_for = [m for m in met if m.met is not None and m.met >= step.backward_end]
    return waited_for or met[-1:]
