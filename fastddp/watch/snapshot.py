"""What a board says at one moment, read as data that may be anything at all."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastddp.watch.layout import (
    HEADER_WORDS,
    MAGIC,
    MODEL_WORDS,
    MODELS,
    MODELS_AT,
    SEQUENCES,
    SEQUENCES_AT,
    TEXT_BYTES,
    WAIT_STRIDE,
    WAIT_WORDS,
    WAITS,
    WAITS_AT,
    WORDS,
    Ending,
    Header,
    Model,
    Source,
    Wait,
)

WHOLE = 0xFFFFFFFF
"""The part of a label that stands for the whole model, and not for one bucket."""
BETWEEN, FILLING = 0, 1
"""The phases of a reducer by number: between two rounds, and while backward brings gradients."""
_UNKNOWN_RANK = 2**64 - 1
_MAX_RANK = 2**31


@dataclass(frozen=True)
class WaitSeen:
    """A wait; the attributes are those of :class:`fastddp.watch.layout.Wait`."""

    place: int
    since_ns: int
    source: Source
    group: int = 0
    number: int = 0
    label: int = 0
    thread: int = 0
    missing: int = 0
    unfinished: int = 0
    text: str = ""

    @property
    def key(self) -> tuple[int, int]:
        """What tells the wait from the next one at the same place."""
        return self.place, self.since_ns

    @property
    def owner(self) -> int:
        """The number of the model that it belongs to; 0 for none."""
        return self.label >> 32

    @property
    def bucket(self) -> int | None:
        """The number of the bucket that it belongs to, from 1 on; None for no bucket."""
        what = self.label & 0xFFFFFFFF
        return None if self.owner == 0 or what == WHOLE else what


@dataclass(frozen=True)
class ModelSeen:
    """A model; the attributes are those of :class:`fastddp.watch.layout.Model`."""

    owner: int
    group: int
    phase: int
    steps: int
    last_param: int
    launched: int
    changed_ns: int


@dataclass(frozen=True)
class Snapshot:
    """A board; the attributes are those of :class:`fastddp.watch.layout.Header`."""

    pid: int
    born: int
    rank: int | None
    seen_ns: int = 0
    stack_signal: int = 0
    stack_file: int = 0
    main_thread: int = 0
    ending: Ending = Ending.NO
    issuer: int = 0
    hand_overs: int = 0
    deadlock_ns: int = 0
    has_script_threads: bool = False
    sequences: tuple[tuple[int, int], ...] = ()
    """Of some groups: the group, and how many collectives the process has begun in it."""
    models: tuple[ModelSeen, ...] = ()
    waits: tuple[WaitSeen, ...] = ()

    def sequence(self, group: int) -> int | None:
        """Returns how many collectives the process has begun in a group; None if not known."""
        return dict(self.sequences).get(group)

    def model(self, owner: int, group: int) -> ModelSeen | None:
        """Returns what is known of a model; None if it is not on the board.

        Args:
            owner: the number of the model.
            group: the number of its group: models of different groups may have equal numbers.
        """
        return next((m for m in self.models if (m.owner, m.group) == (owner, group)), None)


def parse(first: bytes, second: bytes) -> Snapshot | None:
    """Reads a board from two copies of it, made one after the other.

    A wait that is being written, or differs between the copies, is left out: its words may not
    belong together.

    Args:
        first: the bytes of the board.
        second: the bytes of the same board a moment later.

    Returns:
        None if this is not a board.
    """
    if not len(first) == len(second) == 8 * WORDS:
        return None
    header = struct.unpack_from(f"={HEADER_WORDS}Q", second)
    if header[Header.MAGIC] != MAGIC:
        return None
    rank = header[Header.RANK]
    ending = header[Header.ENDING]
    return Snapshot(
        pid=header[Header.PID],
        born=header[Header.BORN],
        rank=rank if rank < _MAX_RANK else None,
        seen_ns=header[Header.SEEN],
        stack_signal=header[Header.STACK_SIGNAL],
        stack_file=header[Header.STACK_FILE],
        main_thread=header[Header.MAIN_THREAD],
        ending=Ending(ending) if ending in Ending.__members__.values() else Ending.NO,
        issuer=header[Header.ISSUER],
        hand_overs=header[Header.HAND_OVERS],
        deadlock_ns=header[Header.DEADLOCK],
        has_script_threads=header[Header.SCRIPT_THREADS] != 0,
        sequences=tuple(_sequences(header)),
        models=tuple(m for i in range(MODELS) if (m := _model(second, i)) is not None),
        waits=tuple(w for i in range(WAITS) if (w := _wait(first, second, i)) is not None),
    )


def _sequences(header: Sequence[int]) -> Iterator[tuple[int, int]]:
    for at in range(SEQUENCES_AT, SEQUENCES_AT + 2 * SEQUENCES, 2):
        group, number = header[at : at + 2]
        if group and number:
            yield group, number - 1


def _model(board: bytes, index: int) -> ModelSeen | None:
    words = struct.unpack_from(f"={MODEL_WORDS}Q", board, 8 * (MODELS_AT + index * MODEL_WORDS))
    if words[Model.OWNER] == 0:
        return None
    return ModelSeen(
        owner=words[Model.OWNER],
        group=words[Model.GROUP],
        phase=words[Model.PHASE],
        steps=words[Model.STEPS],
        last_param=words[Model.LAST_PARAM],
        launched=words[Model.LAUNCHED],
        changed_ns=words[Model.CHANGED],
    )


def _wait(first: bytes, second: bytes, place: int) -> WaitSeen | None:
    begin = 8 * (WAITS_AT + place * WAIT_STRIDE)
    end = begin + 8 * WAIT_STRIDE
    words = struct.unpack_from(f"={WAIT_WORDS}Q", second, begin)
    if words[Wait.SINCE] == 0 or words[Wait.SEQUENCE] % 2 or first[begin:end] != second[begin:end]:
        return None
    if words[Wait.SOURCE] not in Source.__members__.values():
        return None
    return WaitSeen(
        place=place,
        since_ns=words[Wait.SINCE],
        source=Source(words[Wait.SOURCE]),
        group=words[Wait.GROUP],
        number=words[Wait.NUMBER],
        label=words[Wait.LABEL],
        thread=words[Wait.THREAD],
        missing=words[Wait.MISSING],
        unfinished=words[Wait.UNFINISHED],
        text=readable(second[end - TEXT_BYTES : end]),
    )


def readable(text: bytes) -> str:
    """Returns the text in some bytes up to the first zero, without what a terminal obeys."""
    decoded = text.split(b"\0", 1)[0].decode(errors="replace")
    return "".join(char if char.isprintable() else "?" for char in decoded)
