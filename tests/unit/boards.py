"""Boards, made by hand: what ranks say of themselves in situations that are rare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastddp.watch.frames import Frame
from fastddp.watch.layout import Ending, Source, id_of
from fastddp.watch.process import Kind, State
from fastddp.watch.snapshot import ModelSeen, Snapshot, WaitSeen
from fastddp.watch.view import Facts, Member, View

NOW_NS = 1_000_000_000_000
WAITED_S = 12.0
WORLD = id_of("0")
NET = 7
"""The number of the one model."""

STATE = {kind: State(kind, "hrtimer_nanosleep" if kind is Kind.SLEEPING else "") for kind in Kind}
AT_LOADER = (
    Frame("/home/me/loader.py", 12, "__getitem__"),
    Frame(torch.utils.data.dataloader.__file__, 700, "__next__"),
    Frame("/home/me/train.py", 28, "main"),
)
AT_LINE = (Frame("/home/me/train.py", 40, "main"),)


def wait(
    source: Source = Source.SHM,
    *,
    group: int = WORLD,
    number: int = 9,
    bucket: int | None = None,
    owner: int = 0,
    missing: Sequence[int] = (),
    unfinished: Sequence[int] = (),
    text: str = "collective 9",
    waited_s: float = WAITED_S,
    thread: int = 0,
    place: int = 0,
) -> WaitSeen:
    """Returns a wait; `missing` and `unfinished` are ranks in the group."""
    owner = NET if bucket is not None and not owner else owner
    what = 0xFFFFFFFF if bucket is None else bucket
    return WaitSeen(
        place=place,
        since_ns=NOW_NS - int(1e9 * waited_s),
        source=source,
        group=group,
        number=number,
        label=owner << 32 | what if owner else 0,
        thread=thread,
        missing=sum(1 << rank for rank in missing),
        unfinished=sum(1 << rank for rank in unfinished),
        text=text,
    )


def model(steps: int, phase: int = 0, last_param: int = 0, owner: int = NET) -> ModelSeen:
    return ModelSeen(owner, WORLD, phase, steps, last_param, 0, NOW_NS)


@dataclass(frozen=True)
class Rank:
    """What one rank does."""

    waits: Sequence[WaitSeen] = ()
    models: Sequence[ModelSeen] = ()
    state: State = STATE[Kind.SLEEPING]
    frames: Sequence[Frame] = AT_LINE
    cpu_share: float = 0.0
    known_s: float = 60.0
    ending: Ending = Ending.NO
    seen_s_ago: float = 0.5
    hand_overs: int = 0
    has_script_threads: bool = False
    begun: int = 8
    """How many collectives it has begun in each group, before those that it waits for."""
    workers: Sequence[State] = ()
    killed_for_memory: bool = False
    has_board: bool = True
    is_here: bool = True
    note: str = ""
    answer: str = ""

    def member(self, rank: int) -> Member:
        if not self.has_board:
            return Member(rank, note=self.note, answer=self.answer, is_here=self.is_here)
        pid = 100 + rank
        board = Snapshot(
            pid=pid,
            born=1,
            rank=rank,
            seen_ns=NOW_NS - int(1e9 * self.seen_s_ago),
            ending=self.ending,
            issuer=pid,
            hand_overs=self.hand_overs,
            has_script_threads=self.has_script_threads,
            models=tuple(self.models),
            waits=tuple(replace(wait, thread=wait.thread or pid) for wait in self.waits),
        )
        facts = Facts(
            self.state,
            self.cpu_share,
            self.known_s,
            tuple(self.frames),
            tuple(self.workers),
            self.killed_for_memory,
        )
        return Member(rank, board, facts)


def view(*ranks: Rank, me: int = 0, groups: Mapping[int, Sequence[int]] | None = None) -> View:
    """Returns what rank `me` knows of these ranks, by default all in one group."""
    named = groups if groups is not None else {WORLD: range(len(ranks))}
    members = {rank: _with_sequences(what, rank, [*named]) for rank, what in enumerate(ranks)}
    return View(me, NOW_NS, {group: tuple(of) for group, of in named.items()}, members)


def _with_sequences(what: Rank, rank: int, groups: Sequence[int]) -> Member:
    member = what.member(rank)
    if member.board is None:
        return member
    waited_for = {wait.group for wait in what.waits if wait.source is not Source.SHM}
    sequences = tuple((group, what.begun + (group in waited_for)) for group in groups)
    return replace(member, board=replace(member.board, sequences=sequences))
