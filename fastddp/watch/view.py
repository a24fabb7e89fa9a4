"""What one process knows of the ranks at one moment, as plain data for judgement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastddp.watch.frames import Frame
from fastddp.watch.process import State
from fastddp.watch.snapshot import Snapshot


@dataclass(frozen=True)
class Facts:
    """What the system says of a process of this host."""

    state: State
    cpu_share: float = 0.0
    """How much of one core it and its children have used, since the wait was first seen."""
    known_s: float = math.inf
    """For how long it has been looked at; what it has used in a moment says little."""
    frames: tuple[Frame, ...] = ()
    """The stack of its main thread, innermost first; empty where it could not be asked."""
    workers: tuple[State, ...] = ()
    """The states of its data loader workers."""
    killed_for_memory: bool = False
    """Whether the system has killed a process for want of memory since the watch began."""


@dataclass(frozen=True)
class Member:
    """What is known of one rank."""

    rank: int
    """In the default group."""
    board: Snapshot | None = None
    """None for a rank of another host, or one that has not said where its board is."""
    facts: Facts | None = None
    note: str = ""
    """What a rank of another host has written into the store; empty for nothing."""
    answer: str = ""
    """What a rank of another host has answered when it was asked; empty for nothing."""
    is_here: bool = True
    """Whether it is on this host, as far as is known."""


@dataclass(frozen=True)
class View:
    """The ranks as seen from one of them."""

    me: int
    now_ns: int
    groups: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """The global ranks of each group, by the group's number on boards."""
    members: Mapping[int, Member] = field(default_factory=dict)
    """By global rank; without those of which nothing is known."""

    def board(self, rank: int) -> Snapshot | None:
        """Returns the board of a rank; None if it is not known."""
        member = self.members.get(rank)
        return member.board if member is not None else None

    def facts(self, rank: int) -> Facts | None:
        """Returns the facts about a rank; None if there are none."""
        member = self.members.get(rank)
        return member.facts if member is not None else None
