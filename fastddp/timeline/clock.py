"""One clock for the recordings of several hosts.

The processes of a host share a clock. Between hosts the clocks that tell the date are compared
first, which are wrong by as much as the hosts' synchronisation is. What the hosts did together says
more. A collective that waits for all ranks ends nowhere before it was launched everywhere: each one
gives bounds for the difference of two clocks in both directions, which is how A. Duda, G. Harrus,
Y. Haddad and G. Bernard, "Estimating Global Time in Distributed Systems" (ICDCS 1987), align
recordings. Within the bounds the ends are taken for the same moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from fastddp.timeline.matched import Key
from fastddp.timeline.recording import Step


@dataclass(frozen=True, slots=True)
class Shift:
    """What is added to the times of a host to have them on the clock of another."""

    ns: int
    error_ns: int | None
    """By how much this may be wrong; None where the hosts' dates are all that is known."""


@dataclass(frozen=True, slots=True)
class Both:
    """A collective on two hosts, each on a clock of its own."""

    launched: tuple[int, int]
    """When the last rank of each host launched it."""
    ended: tuple[int, int]
    """When the first rank of each host was through with it."""


def shift_between(together: Iterable[Both], by_date: int) -> Shift:
    """Returns the shift from the second host's clock to the first's.

    Args:
        together: collectives that the hosts did together.
        by_date: the shift that the hosts' dates give, in nanoseconds.
    """
    both = list(together)
    if not both:
        return Shift(by_date, None)
    most = min(c.ended[0] - c.launched[1] for c in both)
    least = max(c.launched[0] - c.ended[1] for c in both)
    if least > most:  # not collectives at all, such as a hook that does not communicate
        return Shift(by_date, None)
    same_end = round(median(c.ended[0] - c.ended[1] for c in both))
    shift = min(most, max(least, same_end))
    return Shift(shift, max(most - shift, shift - least))


def done_together(
    here: Iterable[Mapping[Key, Step]], there: Iterable[Mapping[Key, Step]]
) -> list[Both]:
    """Returns the last collective of each round that ranks of two hosts have taken together.

    It is the one that all ranks wait for, when they have nothing else to do.

    Args:
        here: the steps of each rank of the first host.
        there: the steps of each rank of the second host.
    """
    ours, theirs = _last_collectives(here), _last_collectives(there)
    result = []
    for key, (launched, ended) in ours.items():
        if key in theirs:
            result.append(Both((launched, theirs[key][0]), (ended, theirs[key][1])))
    return result


def _last_collectives(
    ranks: Iterable[Mapping[Key, Step]],
) -> dict[tuple[Key, int], tuple[int, int]]:
    """Returns when the last rank launched, and the first one ended, each round's last collective.

    By the collective's number too: others are not compared with it.
    """
    found: dict[tuple[Key, int], tuple[int, int]] = {}
    for steps in ranks:
        for key, step in steps.items():
            waits = [(launch, launch.wait) for launch in step.launches if launch.wait is not None]
            if not waits:
                continue
            last, wait = max(waits, key=lambda pair: pair[0].number)
            launched, ended = found.get((key, last.number), (last.at, wait.end))
            found[key, last.number] = max(launched, last.at), min(ended, wait.end)
    return found
