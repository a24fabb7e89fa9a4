"""How a round goes, which is decided when it begins."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Gives(Enum):
    """What this rank adds to a round."""

    BACKWARD = "the gradients of a backward"
    WHAT_IS_THERE = "what is in .grad, wherever it comes from"
    NOTHING = "nothing: the round is the other ranks'"


@dataclass(frozen=True, slots=True)
class Manner:
    """How a round goes."""

    gives: Gives
    is_retired: bool
    """Whether this rank's model has changed, so that it has nothing to add.

    What is in ``.grad`` is then for the reducer that comes after this one.
    """
    is_manual: bool
    """Whether ``finalize`` ends the round, not the end of its backward."""
    is_early: bool
    """Whether buckets are launched as they fill."""
    is_captured: bool
    """Whether the round is recorded into a graph."""
    knows_counts: bool
    """Whether it is known how many gradients each parameter gets in one backward.

    A parameter that re-entrant checkpoints share gets several, and only the end of the first round
    tells how many, so that round launches nothing before its end. Each rank decides for itself when
    to launch, so the decision rests on what this rank has seen.
    """
    is_followed: bool
    """Whether there are collectives to launch after the buckets."""
    scale: float
    """The factor for each gradient on the way into its bucket."""
