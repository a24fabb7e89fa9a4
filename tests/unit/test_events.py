"""The ring of events: both writers, wrap-around, forks, files."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fastddp import extension
from fastddp.watch import events, ring
from fastddp.watch.events import Kind
from fastddp.watch.ring import Header, Ring
from tests.conftest import require_native


class Event(NamedTuple):
    time: int
    kind: int
    number: int
    owner: int
    a: int
    b: int


def _words(content: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(content) // 8}Q", content)


def _events(content: bytes) -> list[Event]:
    """Reads the ring without the package's own reader."""
    words = _words(content)
    capacity, end = words[1], words[2]
    found = []
    for number in range(max(0, end - capacity), end):
        at = 16 + number % capacity * 4
        when, what, a, b = words[at : at + 4]
        found.append(Event(when, what & 0xFF, what >> 8 & 0xFFFFFF, what >> 32, a, b))
    return found


@pytest.fixture(params=["native", "python"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Have a process without a ring, and one of the two writers."""
    if request.param == "native":
        require_native()
    else:
        monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.delenv("FASTDDP_TRACE", raising=False)
    before = events._ring, events._write, events._file, events._folder
    events._ring = events._write = events._file = events._folder = None
    yield request.param
    events._ring, events._write, events._file, events._folder = before
    native = extension.load()
    if native is not None:
        native.use_events(0 if events._ring is None else events._ring.address)


def _recorded() -> list[Event]:
    assert events._ring is not None
    return _events(events._ring.copy())


def test_an_event_has_its_time_number_owner_and_values(writer: str) -> None:
    before = time.monotonic_ns()
    events.record(Kind.ROUND_BEGIN, owner=2**32 - 1, a=5, b=2**64 - 1)
    events.record(Kind.ERROR)
    after = time.monotonic_ns()
    first, second = _recorded()
    assert first[1:] == (3, 0, 2**32 - 1, 5, 2**64 - 1)
    assert second[1:] == (15, 1, 0, 0, 0)
    assert before <= first.time <= second.time <= after


def test_the_header_says_who_and_when(writer: str) -> None:
    events.start()
    assert events._ring is not None
    words = _words(events._ring.copy())
    assert words[0].to_bytes(8, "little") == b"FASTEV01"
    assert words[1] == 32768
    assert words[3] == os.getpid()
    assert words[4] == 2**64 - 1
    assert words[5] == 0
    assert words[8] != 0
    assert abs(time.monotonic_ns() - words[6] - (time.time_ns() - words[7])) < 10**9
    events.start(3, 4)
    words = _words(events._ring.copy())
    assert words[4:6] == (3, 4)
    assert words[9:16] == (0,) * 7


def test_both_writers_write_the_same() -> None:
    require_native()
    native = extension.load()
    assert native is not None
    mine, other = Ring.make(8), Ring.make(8)
    native.use_events(other.address)
    try:
        for nth in range(20):
            args = (nth % 18 + 1, nth * 2**27, nth * 2**59, 2**64 - 1 - nth)
            mine.write(*args)
            native.record_event(*args)
    finally:
        native.use_events(0 if events._ring is None else events._ring.address)
    without_times = [[event[1:] for event in _events(one.copy())] for one in (mine, other)]
    assert without_times[0] == without_times[1]
    assert [event[1] for event in without_times[0]] == list(range(12, 20))
    assert mine.get(Header.NEXT) == other.get(Header.NEXT) == 20


def test_new_events_take_the_places_of_the_oldest(writer: str) -> None:
    for nth in range(ring.CAPACITY + 10):
        events.record(Kind.LAUNCH, a=nth)
    found = _recorded()
    assert len(found) == ring.CAPACITY
    assert [event.number for event in found] == list(range(10, ring.CAPACITY + 10))
    assert all(event.number == event.a for event in found)


def test_a_dump_is_a_whole_file_that_the_next_one_replaces(writer: str, tmp_path: Path) -> None:
    events.start(1, 2)
    events.record(Kind.LAUNCH, a=1)
    path = events.dump(tmp_path / "out")
    assert path == tmp_path / "out" / f"rank-1.{os.getpid()}.ring"
    assert path.stat().st_size == (16 + 4 * ring.CAPACITY) * 8
    events.record(Kind.LAUNCH, a=2)
    assert [event.a for event in _events(path.read_bytes())] == [1]
    assert events.dump(tmp_path / "out") == path
    assert [event.a for event in _events(path.read_bytes())] == [1, 2]
    assert list(path.parent.iterdir()) == [path]


def test_a_trace_goes_on_in_the_file(writer: str, tmp_path: Path) -> None:
    events.start(1, 2)
    events.record(Kind.LAUNCH, a=1)
    events.trace(tmp_path / "one")
    events.record(Kind.LAUNCH, a=2)
    path = tmp_path / "one" / f"rank-1.{os.getpid()}.ring"
    assert [event.a for event in _events(path.read_bytes())] == [1, 2]
    assert events.dump(tmp_path / "one") == path
    events.trace(tmp_path / "two")
    events.record(Kind.LAUNCH, a=3)
    assert [event.a for event in _events(path.read_bytes())] == [1, 2]
    other = tmp_path / "two" / path.name
    assert [event.a for event in _events(other.read_bytes())] == [1, 2, 3]


def test_a_file_is_named_after_the_rank_once_that_is_known(writer: str, tmp_path: Path) -> None:
    events.trace(tmp_path)
    assert list(tmp_path.iterdir()) == []
    events.record(Kind.LAUNCH)
    assert [path.name for path in tmp_path.iterdir()] == [f"rank-unknown.{os.getpid()}.ring"]
    events.start(3, 4)
    events.record(Kind.LAUNCH)
    (path,) = tmp_path.iterdir()
    assert path.name == f"rank-3.{os.getpid()}.ring"
    assert len(_events(path.read_bytes())) == 2


def test_a_folder_that_cannot_be_made_is_an_error_or_a_warning(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        events.trace(file)
    monkeypatch.setenv("FASTDDP_TRACE", str(file))
    with pytest.warns(RuntimeWarning, match="no events are written to"):
        events.record(Kind.LAUNCH, a=1)
    events.record(Kind.LAUNCH, a=2)
    assert [event.a for event in _recorded()] == [1, 2]


def test_a_forked_child_gets_a_ring_of_its_own(writer: str, tmp_path: Path) -> None:
    events.start(0, 1)
    events.trace(tmp_path)
    events.record(Kind.LAUNCH, a=1)
    with warnings.catch_warnings():  # of threads, which newer Pythons warn of
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            events.record(Kind.LAUNCH, a=2)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    events.record(Kind.LAUNCH, a=3)
    of_parent = tmp_path / f"rank-0.{os.getpid()}.ring"
    of_child = tmp_path / f"rank-unknown.{child}.ring"
    assert sorted(tmp_path.iterdir()) == [of_parent, of_child]
    assert [event.a for event in _events(of_parent.read_bytes())] == [1, 3]
    assert [event.a for event in _events(of_child.read_bytes())] == [2]
    assert _words(of_child.read_bytes())[Header.PID] == child


VICTIM = """
import os, signal, sys
from fastddp import extension
if sys.argv[1] == "python":
    extension.load = lambda: None
from fastddp.watch import events
from fastddp.watch.events import Kind
events.start(0, 1)
for step in range(1000):
    events.record(Kind.ROUND_BEGIN, a=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_survives_a_killed_process(writer: str, tmp_path: Path) -> None:
    environ = os.environ | {"FASTDDP_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, writer], env=environ, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    (path,) = tmp_path.iterdir()
    assert [event.a for event in _events(path.read_bytes())] == list(range(1000))
