"""The board of this process, see ``csrc/core/board.h``: made when first asked for, never freed.

A forked child begins without one: what it did on the board of its parent would be a lie.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Mapping

from fastddp import config, extension
from fastddp.watch.layout import (
    MAGIC,
    MODEL_WORDS,
    MODELS,
    MODELS_AT,
    NATIVE_MODELS,
    NATIVE_WAITS,
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
from fastddp.watch.process import born
from fastddp.watch.snapshot import Snapshot, WaitSeen, parse

_UNKNOWN_RANK = 2**64 - 1


class Board:
    """A board in memory that other processes of the host can read, where there is such memory.

    Each word has one writer at a time. Methods may be called from any thread.
    """

    def __init__(self) -> None:
        self.fd = _memory_file(8 * WORDS)
        """The descriptor of the memory; -1 if no other process can read it."""
        self._memory = mmap.mmap(self.fd, 8 * WORDS)
        # C++ has the address, and threads of C++ outlive this module when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._memory))
        self._words = memoryview(self._memory).cast("Q")
        # A signal handler, or a reducer that is freed while this is held, may come here again.
        self._lock = threading.RLock()
        self._free_models = set(range(NATIVE_MODELS, MODELS))
        self._free_waits = set(range(NATIVE_WAITS, WAITS))
        self._orders: dict[int, str] = {}
        self.put(Header.PID, os.getpid())
        self.put(Header.BORN, born(os.getpid()) or 0)
        self.put(Header.RANK, _UNKNOWN_RANK)
        self.put(Header.SEEN, time.monotonic_ns())
        self.put(Header.MAIN_THREAD, threading.main_thread().ident or 0)
        self.put(Header.MAGIC, MAGIC)

    @property
    def address(self) -> int:
        """Where the board lies in the memory of this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def put(self, word: int, value: int) -> None:
        """Stores one word.

        Args:
            word: the index of the word, such as a :class:`Header`.
            value: at least 0 and less than 2**64.
        """
        self._words[word] = value

    def read(self) -> Snapshot:
        """Returns what the board says now."""
        first, second = self._words.tobytes(), self._words.tobytes()
        snapshot = parse(first, second)
        assert snapshot is not None
        return snapshot

    def put_sequences(self, sequences: Mapping[int, int]) -> None:
        """Stores how many collectives this process has begun, by the number of the group.

        Args:
            sequences: those of any number of groups; the first 8 are stored.
        """
        pairs = [*sequences.items()][:SEQUENCES]
        for i in range(SEQUENCES):
            at = SEQUENCES_AT + 2 * i
            group, number = (pairs[i][0], pairs[i][1] + 1) if i < len(pairs) else (0, 0)
            if self._words[at] != group:
                self._words[at + 1] = 0  # never another group's number
                self._words[at] = group
            self._words[at + 1] = number

    # ---- models of the Python engine -------------------------------------------------------------

    def take_model(self) -> int | None:
        """Returns the number of a free place for a model; None if there is none."""
        with self._lock:
            return self._free_models.pop() if self._free_models else None

    def put_model(self, place: int, word: Model, value: int) -> None:
        """Stores a word of the model at a place."""
        self.put(MODELS_AT + place * MODEL_WORDS + word, value)

    def free_model(self, place: int) -> None:
        """Frees a place that :meth:`take_model` has returned."""
        self.put_model(place, Model.OWNER, 0)
        with self._lock:
            self._free_models.add(place)

    # ---- waits that Python writes ----------------------------------------------------------------

    def begin_wait(
        self,
        source: Source,
        text: str,
        *,
        since_ns: int,
        group: int = 0,
        number: int = 0,
        label: int = 0,
        thread: int | None = None,
    ) -> int | None:
        """Writes a wait, which stays on the board until :meth:`end_wait`.

        Args:
            source: what kind of wait it is.
            text: the name of the wait, for people.
            since_ns: when it began, by ``time.monotonic_ns()``; not 0.
            group: the :func:`fastddp.watch.layout.id_of` the name of its group; 0 for none.
            number: the collective's number in its group; 0 where it is not known.
            label: the label of the collective, see ``csrc/shm/label.h``.
            thread: the kernel's number of the thread that waits; None for this one.

        Returns:
            The place of the wait; None if all places are taken, and then nothing is written.
        """
        with self._lock:
            if not self._free_waits:
                return None
            place = self._free_waits.pop()
            self._orders.pop(place, None)
        words = [0] * WAIT_WORDS
        words[Wait.SINCE] = since_ns
        words[Wait.GROUP] = group
        words[Wait.NUMBER] = number
        words[Wait.LABEL] = label
        words[Wait.THREAD] = threading.get_native_id() if thread is None else thread
        words[Wait.SOURCE] = source
        self._write_wait(place, words, text)
        return place

    def end_wait(self, place: int | None) -> None:
        """Takes the wait at a place off the board; the place may be None."""
        if place is None:
            return
        self._write_wait(place, [0] * WAIT_WORDS, "")
        with self._lock:
            self._free_waits.add(place)
            self._orders.pop(place, None)

    def _write_wait(self, place: int, words: list[int], text: str) -> None:
        at = WAITS_AT + place * WAIT_STRIDE
        sequence = self._words[at + Wait.SEQUENCE] | 1
        self._words[at + Wait.SEQUENCE] = sequence
        for index in range(Wait.SINCE, WAIT_WORDS):
            self._words[at + index] = words[index]
        data = text.encode(errors="replace")[: TEXT_BYTES - 1].ljust(TEXT_BYTES, b"\0")
        self._words[at + WAIT_WORDS : at + WAIT_STRIDE] = memoryview(data).cast("Q")
        self._words[at + Wait.SEQUENCE] = sequence + 1

    # ---- orders to fail --------------------------------------------------------------------------

    def order_to_fail(self, wait: WaitSeen, text: str) -> bool:
        """Orders a wait of this process to fail; returns whether the order was taken.

        Who waits looks for orders several times per second, if it can: a wait inside of another
        library cannot. A collective that the script has called itself never takes one.

        Args:
            wait: the wait, as :meth:`read` has shown it.
            text: the message of the error that it raises.
        """
        if wait.place < NATIVE_WAITS:
            native = extension.load()
            fail = getattr(native, "fail_wait", None)
            return fail is not None and bool(fail(wait.place, wait.since_ns, text))
        if wait.source is Source.SCRIPT:
            return False
        at = WAITS_AT + wait.place * WAIT_STRIDE
        with self._lock:
            if wait.place in self._free_waits or self._words[at + Wait.SINCE] != wait.since_ns:
                return False
            self._orders[wait.place] = text
            return True

    def order_of(self, place: int | None) -> str:
        """Returns the text with which the wait at a place is to fail; empty to go on waiting."""
        return self._orders.get(place, "") if place is not None else ""


def _memory_file(size: int) -> int:
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        fd = os.memfd_create("fastddp board", os.MFD_CLOEXEC)
    except OSError:
        return -1
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        return -1
    return fd


# ---- this process's board ------------------------------------------------------------------------

_board: Board | None = None
_abandoned: list[Board] = []  # of parents: mapped as long as a thread could be writing to it
_making = threading.Lock()


def own() -> Board | None:
    """Returns the board of this process; None before :func:`make`, and in a forked child."""
    return _board


def make() -> Board | None:
    """Returns the board of this process, made if there is none yet.

    Returns:
        None if ``FASTDDP_STALL`` is ``off``, or the system has no memory for it.
    """
    global _board
    if _board is not None:
        return _board
    if config.stall() == "off":
        return None
    with _making:
        if _board is None:
            with contextlib.suppress(OSError, ValueError):
                board = Board()
                _use(board.address)
                _board = board
    return _board


def _use(address: int) -> None:
    use = getattr(extension.load(), "use_board", None)
    if use is not None:
        use(address)


def _forget() -> None:
    """Leaves the board to the parent, in a forked child."""
    global _board, _making
    _making = threading.Lock()
    if _board is not None:
        _use(0)
        _abandoned.append(_board)
        _board = None


def _say_ending() -> None:
    if _board is not None:
        _board.put(Header.ENDING, Ending.EXITING)


atexit.register(_say_ending)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
