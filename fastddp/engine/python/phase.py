"""The phases of a reducer, and the moves from one to another that are legal."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a reducer is in the life of a round."""

    BETWEEN = "between rounds"
    FILLING = "backward brings gradients"
    IN_FLIGHT = "backward is over, all is launched, and finalize() is to come"
    FINALIZED = "finalize() has come, but the backward is not over yet"


PHASES = tuple(Phase)
"""In the order of the numbers that boards have for them."""

_MOVES = {
    Phase.BETWEEN: (Phase.FILLING,),
    Phase.FILLING: (Phase.BETWEEN, Phase.IN_FLIGHT, Phase.FINALIZED),
    Phase.IN_FLIGHT: (Phase.BETWEEN,),
    Phase.FINALIZED: (Phase.BETWEEN,),
}


def move(now: Phase, to: Phase) -> Phase:
    """Returns the phase ``to``, if a reducer may go there from the phase ``now``.

    A move that is not in the table would begin a second round over one that is under way, and the
    ranks would launch different collectives.

    Raises:
        RuntimeError: if the move is not legal; names both phases.
    """
    if to not in _MOVES[now]:
        raise RuntimeError(
            f"fastddp: a reducer cannot go from phase {now.name} ({now.value}) to phase {to.name}"
            f" ({to.value})"
        )
    return to
