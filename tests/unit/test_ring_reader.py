"""Rings of events are read as they are: wrapped, torn, cut off, or full of anything at all."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from fastddp.timeline.steps import read_steps
from fastddp.watch.events import Kind
from fastddp.watch.ring import HEADER_WORDS, MAGIC, Ring
from fastddp.watch.ring_reader import Event, parse, read
from tests.rings import MS, OWNER, Words, ring, step

WORD = st.integers(0, 2**64 - 1)
PLAUSIBLE_WORD = st.one_of(
    WORD, st.integers(0, 40), st.builds(lambda n: n << 8 | 7, st.integers(0, 2**56 - 1))
)


def ticks(count: int, first: int = 0) -> list[Words]:
    return [(n * MS, Kind.LAUNCH, OWNER, n, 2 * n) for n in range(1 + first, 1 + first + count)]


def test_an_empty_ring() -> None:
    found = parse(ring([], rank=1, world_size=4, host=9, made_ns=5, made_epoch_ns=1005))
    assert (found.rank, found.world_size, found.host, found.pid) == (1, 4, 9, 4321)
    assert (list(found.events()), found.num_begun, found.num_torn) == ([], 0, 0)
    assert found.epoch_ns(7) == 1007


def test_events_come_by_time_and_with_all_words() -> None:
    late, early = (
        (9, Kind.ERROR, 0, 1, 2),
        (3, Kind.COLLECTIVE_MET, 2**32 - 1, 2**64 - 1, 2**64 - 1),
    )
    assert list(parse(ring([late, early])).events()) == [Event(*early), Event(*late)]


def test_a_rank_that_is_not_known() -> None:
    assert parse(ring([], rank=None)).rank is None
    assert parse(ring([], rank=7, world_size=2)).rank is None
    assert parse(ring([], host=0)).host is None


@pytest.mark.parametrize("count", [15, 16, 17, 100])
def test_a_ring_that_has_gone_round_keeps_the_latest_events(count: int) -> None:
    found = parse(ring(ticks(count), capacity=16))
    assert [event.a for event in found.events()] == list(range(max(1, count - 15), count + 1))
    assert (found.num_begun, found.num_torn) == (count, 0)


def test_what_a_real_ring_holds_is_read() -> None:
    written = Ring.make(8)
    for number in range(11):
        written.write(Kind.LAUNCH, OWNER, number, 2**63 + number)
    found = parse(written.copy())
    assert [(event.kind, event.owner, event.a) for event in found.events()] == [
        (Kind.LAUNCH, OWNER, number) for number in range(3, 11)
    ]
    assert found.pid == os.getpid()
    assert len(parse(Ring.make().copy())) == 0


def test_a_torn_event_is_dropped() -> None:
    # The newest event was begun, and its last word, which has the number, not written.
    memory = bytearray(ring(ticks(20), capacity=16))
    at = 8 * (HEADER_WORDS + 4 * (19 % 16) + 1)
    (word,) = struct.unpack_from("<Q", memory, at)
    struct.pack_into("<Q", memory, at, word - (16 << 8))  # the number of the event before, there
    found = parse(bytes(memory))
    assert [event.a for event in found.events()] == list(range(5, 20))
    assert found.num_torn == 1


def test_events_that_were_overwritten_during_the_copy_are_dropped() -> None:
    memory = ring(ticks(20), capacity=16)
    assert [event.a for event in parse(memory, 23).events()] == list(range(8, 21))
    assert list(parse(memory, 36).events()) == []
    assert list(parse(memory, 2**64 - 1).events()) == []


def test_a_ring_that_was_cut_off_gives_what_is_there() -> None:
    memory = ring(ticks(10), capacity=16)
    found = parse(memory[: 8 * (HEADER_WORDS + 4 * 6) + 5])
    assert [event.a for event in found.events()] == [1, 2, 3, 4, 5, 6]
    assert found.num_torn == 4
    assert list(parse(memory[: 8 * HEADER_WORDS]).events()) == []


@pytest.mark.parametrize(
    ("word", "value", "text"),
    [
        (0, MAGIC + 1, "begins with"),
        (1, 0, "capacity of 0"),
        (1, 24, "power of two"),
        (1, 2**60, "power of two"),
        (2, 2**64 - 1, "written to"),
    ],
)
def test_a_header_that_cannot_be_is_refused(word: int, value: int, text: str) -> None:
    memory = bytearray(ring(ticks(3)))
    struct.pack_into("<Q", memory, 8 * word, value)
    with pytest.raises(ValueError, match=text):
        parse(bytes(memory))


def test_a_file_is_read_and_anything_else_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.1.ring"
    path.write_bytes(ring(step(0, 1)))
    assert len(read(path)) == 7
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        read(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        read(tmp_path)


@hypothesis.given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        list(parse(data).events())
    except ValueError:
        return


@hypothesis.given(
    st.lists(PLAUSIBLE_WORD, min_size=15, max_size=15),
    st.lists(st.tuples(WORD, PLAUSIBLE_WORD, PLAUSIBLE_WORD, PLAUSIBLE_WORD), max_size=20),
    st.integers(0, 30),
)
def test_any_words_are_read_or_refused(
    header: list[int], events: list[tuple[int, int, int, int]], since: int
) -> None:
    words = [MAGIC, *header, *(word for event in events for word in event)]
    words[1] = 16
    try:
        found = parse(struct.pack(f"<{len(words)}Q", *words), since)
    except ValueError:
        return
    read_steps(found.events())


@hypothesis.given(
    st.lists(
        st.tuples(
            st.integers(1, 50),
            st.sampled_from(list(Kind)),
            st.sampled_from([0, 1, 2]),
            st.integers(0, 3),
            st.one_of(WORD, st.integers(0, 3)),
        ),
        max_size=60,
    )
)
def test_events_in_any_order_become_steps_that_add_up(events: list[Words]) -> None:
    recording = read_steps(parse(ring(events)).events())
    for found in recording.steps:
        assert found.forward <= found.backward <= found.backward_end <= found.end_of_round
        assert found.end_of_round <= found.end
        assert found.begin is None or found.begin <= found.forward
