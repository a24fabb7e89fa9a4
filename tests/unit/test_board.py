"""Boards: the same layout in both languages, read whole or not at all, and never trusted."""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastddp import extension
from fastddp.watch import board, groups, layout
from fastddp.watch.board import Board
from fastddp.watch.layout import Ending, Header, Model, Source, Wait, id_of
from fastddp.watch.peers import Address, Peer
from fastddp.watch.snapshot import parse
from tests.conftest import require_native


@pytest.fixture
def own() -> Iterator[Board]:
    own = Board()
    yield own
    if own.fd >= 0:
        os.close(own.fd)


def copy_of(own: Board) -> bytearray:
    return bytearray(os.pread(own.fd, 8 * layout.WORDS, 0))


def put(data: bytearray, at: int, value: int) -> None:
    struct.pack_into("=Q", data, at, value)


# ---- the layout ----------------------------------------------------------------------------------


def test_both_languages_have_one_layout() -> None:
    require_native()
    native = extension.load()
    assert native is not None
    theirs = native.board_layout()
    assert len(theirs) > 10
    ours = {}
    for name in theirs:
        where: object = layout
        for part in name.split("."):
            where = getattr(where, part)
        ours[name] = where
    assert theirs == ours


def test_both_languages_have_one_number_for_a_group() -> None:
    require_native()
    native = extension.load()
    assert native is not None
    for name in ("", "0", "a group", "Gruppe \u00e4", "x" * 1000):
        assert native.board_group_id(name) == id_of(name)


def test_words_of_different_kinds_do_not_overlap() -> None:
    assert max(Header) < layout.SEQUENCES_AT
    assert layout.SEQUENCES_AT + 2 * layout.SEQUENCES <= layout.HEADER_WORDS
    assert len(Model) <= layout.MODEL_WORDS
    assert len(Wait) <= layout.WAIT_WORDS
    assert layout.NATIVE_MODELS < layout.MODELS
    assert layout.NATIVE_WAITS < layout.WAITS
    assert layout.WORDS == layout.WAITS_AT + layout.WAITS * layout.WAIT_STRIDE


# ---- what is written is read ---------------------------------------------------------------------


def test_what_is_written_is_read_by_another_process(own: Board) -> None:
    own.put(Header.RANK, 3)
    own.put(Header.ENDING, Ending.EXITING)
    model = own.take_model()
    assert model is not None
    own.put_model(model, Model.OWNER, 7)
    own.put_model(model, Model.STEPS, 41)
    place = own.begin_wait(
        Source.NAMED, "a call \u00e4", since_ns=5, group=id_of("g"), number=2, label=7 << 32 | 1
    )
    reader, writer = os.pipe()
    address = groups.own_address(own.fd)
    pid = os.fork()
    if pid == 0:  # reads the board of its parent
        snapshot = Peer(address).read()
        os.write(writer, repr(snapshot).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    said = os.read(reader, 1 << 16).decode()
    os.close(reader)
    os.close(writer)
    snapshot = own.read()
    assert said == repr(snapshot)
    assert (snapshot.pid, snapshot.rank, snapshot.ending) == (os.getpid(), 3, Ending.EXITING)
    assert [(m.owner, m.steps) for m in snapshot.models] == [(7, 41)]
    (wait,) = snapshot.waits
    assert (wait.place, wait.since_ns, wait.source) == (place, 5, Source.NAMED)
    assert (wait.text, wait.group, wait.number) == ("a call \u00e4", id_of("g"), 2)
    assert (wait.owner, wait.bucket, wait.thread) == (7, 1, threading.get_native_id())
    own.end_wait(place)
    own.free_model(model)
    assert (own.read().models, own.read().waits) == ((), ())


def test_counts_of_groups(own: Board) -> None:
    own.put_sequences({5: 0, 6: 41})
    assert [own.read().sequence(group) for group in (5, 6, 7)] == [0, 41, None]
    own.put_sequences({6: 42} | {100 + i: i for i in range(20)})
    assert [own.read().sequence(group) for group in (5, 6, 106, 107)] == [None, 42, 6, None]
    own.put_sequences({})
    assert own.read().sequences == ()


def test_a_text_is_cut_to_fit(own: Board) -> None:
    own.begin_wait(Source.NAMED, "\u00e4" * 1000, since_ns=1)
    (wait,) = own.read().waits
    assert wait.text.startswith("\u00e4" * 100)
    assert len(wait.text.encode()) < layout.TEXT_BYTES + 3


def test_places_run_out_and_come_back(own: Board) -> None:
    num_places = layout.WAITS - layout.NATIVE_WAITS
    places = [own.begin_wait(Source.NAMED, "a call", since_ns=1) for _ in range(num_places)]
    assert sorted(place or 0 for place in places) == [*range(layout.NATIVE_WAITS, layout.WAITS)]
    assert own.begin_wait(Source.NAMED, "one too many", since_ns=1) is None
    own.end_wait(None)
    own.end_wait(places[0])
    assert own.begin_wait(Source.NAMED, "another", since_ns=1) == places[0]


def test_a_wait_is_read_whole_while_it_changes(own: Board) -> None:
    stop = threading.Event()

    def write() -> None:
        for i in range(1, 10**9):
            if stop.is_set():
                return
            own.end_wait(
                own.begin_wait(Source.NAMED, f"{i}", since_ns=i, group=i, number=i, label=i)
            )

    thread = threading.Thread(target=write)
    thread.start()
    peer = Peer(groups.own_address(own.fd))
    seen = 0
    deadline = time.monotonic() + 30
    try:
        while seen < 50 and time.monotonic() < deadline:
            snapshot = peer.read()
            assert snapshot is not None
            for wait in snapshot.waits:
                seen += 1
                assert {wait.since_ns, wait.group, wait.number, wait.label} == {int(wait.text)}
    finally:
        stop.set()
        thread.join()
    assert seen >= 50


# ---- what is not a board -------------------------------------------------------------------------


def test_a_wait_that_is_being_written_is_left_out(own: Board) -> None:
    own.begin_wait(Source.NAMED, "a call", since_ns=1)
    place = own.read().waits[0].place
    data = copy_of(own)
    at = 8 * (layout.WAITS_AT + place * layout.WAIT_STRIDE)
    later = bytearray(data)
    put(later, at, 3)
    odd = parse(bytes(later), bytes(later))
    assert odd is not None
    assert odd.waits == ()
    put(later, at, 4)  # whole, but not what was there a moment before
    changed = parse(bytes(data), bytes(later))
    assert changed is not None
    assert changed.waits == ()


@pytest.mark.parametrize("size", [0, 7, 8 * layout.WORDS - 8, 8 * layout.WORDS + 8])
def test_another_size_is_not_a_board(own: Board, size: int) -> None:
    data = bytes(copy_of(own)).ljust(size, b"\0")[:size]
    assert parse(data, data) is None


def test_random_bytes_are_read_without_harm(own: Board) -> None:
    for seed in range(50):
        data = bytearray(bytes((seed * 31 + i * i) % 256 for i in range(8 * layout.WORDS)))
        put(data, 0, layout.MAGIC)
        for place in range(layout.WAITS):
            at = 8 * (layout.WAITS_AT + place * layout.WAIT_STRIDE)
            put(data, at, 2)
            put(data, at + 8 * Wait.SOURCE, place % 8)
        snapshot = parse(bytes(data), bytes(data))
        assert snapshot is not None
        assert snapshot.rank is None
        assert snapshot.ending is Ending.NO
        assert all(wait.text.isprintable() for wait in snapshot.waits)
    put(data, 0, layout.MAGIC + 1)
    assert parse(bytes(data), bytes(data)) is None


def test_a_peer_that_is_not_what_it_says_is_not_read(own: Board) -> None:
    address = groups.own_address(own.fd)
    assert Peer(address).read() is not None
    assert Peer(replace(address, born=address.born + 1)).read() is None
    assert Peer(replace(address, pid=2**22 + 5)).read() is None
    assert Peer(replace(address, fd=-1)).read() is None
    assert Peer(replace(address, fd=10**6)).read() is None
    own.put(Header.PID, 1)
    assert Peer(address).read() is None


def test_a_pipe_or_a_short_file_is_not_read(own: Board) -> None:
    address = groups.own_address(own.fd)
    reader, writer = os.pipe()
    for fd in (reader, writer):
        assert Peer(replace(address, fd=fd)).read() is None
        os.close(fd)
    peer = Peer(address)
    assert peer.read() is not None
    os.ftruncate(own.fd, 100)
    assert peer.read() is None
    os.ftruncate(own.fd, 8 * layout.WORDS)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"ab 1 2",
        b"ab 1 2 3 4",
        b"ab -1 2 3",
        b"../x 1 2 3",
        b"ab 1 2 3\n",
        b"a" * 999,
    ],
)
def test_what_is_not_an_address_is_not_one(text: bytes) -> None:
    assert Address.parse(text) is None
    good = Address("ab", 1, 2, -1)
    assert Address.parse(str(good).encode()) == good


# ---- the board of this process -------------------------------------------------------------------


def test_there_is_one_board_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_board", None)
    monkeypatch.setenv("FASTDDP_STALL", "off")
    assert board.make() is None
    monkeypatch.setenv("FASTDDP_STALL", "warn")
    made = board.make()
    assert made is not None
    assert made is board.make() is board.own()
    board._use(0)


def test_the_memory_of_a_board_is_never_freed() -> None:
    pid = os.fork()
    if pid == 0:
        own = Board()
        address = own.address
        del own
        gc.collect()
        os._exit(ctypes.c_uint64.from_address(address).value != layout.MAGIC)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def test_a_thread_may_come_to_the_board_while_it_is_there(own: Board) -> None:
    places: list[int | None] = []

    def interrupted() -> None:
        with own._lock:
            places.append(own.begin_wait(Source.NAMED, "in a signal handler", since_ns=1))

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(10)
    assert places


def test_a_forked_child_has_no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_board", None)
    parent = board.make()
    assert parent is not None
    pid = os.fork()
    if pid == 0:
        own = board.own() is None
        made = board.make()
        fresh = made is not None and made.read().pid == os.getpid()
        os._exit(0 if own and fresh else 1)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert parent.read().pid == os.getpid()
    board._use(0)


def test_without_memory_files_a_board_is_for_this_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    alone = Board()
    assert alone.fd == -1
    place = alone.begin_wait(Source.NAMED, "a call", since_ns=1)
    assert [wait.place for wait in alone.read().waits] == [place]
    assert not groups.is_here(groups.own_address(alone.fd))
