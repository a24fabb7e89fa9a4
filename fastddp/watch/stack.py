"""Python stacks of other processes of this host, even of one that holds the GIL in C code.

A process lets others ask for its stack by a file in memory, which they open through ``/proc``. They
write a question into it, and a thread of the process that looks at it now and then, the watcher,
writes the stack. That thread needs the GIL.

If it does not get the GIL, there is another way: the process has registered a handler of Python's
faulthandler for a signal. The handler is C code that takes no lock and allocates nothing, and
writes the stack into the same file. A process that asks sends the signal.

The signal goes to the process's main thread, and the handler writes the stack of that one alone:
its frames stand still meanwhile. Those of other threads may be freed while they are read, which
ends the process with SIGSEGV: after ten answers where three threads are busy. A main thread that
runs may be just entering or leaving a frame; the risk is small, and a thread that sleeps has none,
so that is the time to ask.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal as signals
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fastddp.watch import process
from fastddp.watch.frames import Frame as Frame
from fastddp.watch.frames import is_at_breakpoint as is_at_breakpoint
from fastddp.watch.frames import own as own
from fastddp.watch.frames import place_in_script as place_in_script
from fastddp.watch.script_call import ScriptCall as ScriptCall
from fastddp.watch.script_call import collective_of_script as collective_of_script

_FILE = "fastddp stacks"
_LOOK_S = 0.005
_QUESTION = b"?"
_CALM_S = 0.25
"""So long, whoever asks waits for a moment at which the other one's main thread sleeps."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class _Answering:
    """How this process answers."""

    signal: int
    fd: int
    inode: tuple[int, int]

    def works(self) -> bool:
        """Whether the script has left us the signal and the file."""
        catches = process.catches(os.getpid(), self.signal)
        return catches and self._has_signal() and self._has_file()

    def stop(self) -> None:
        """Gives the signal and the file back, but nothing that is the script's by now."""
        if self._has_signal():
            faulthandler.unregister(self.signal)
        if self._has_file():
            os.close(self.fd)

    def _has_signal(self) -> bool:
        # Python knows of its own handlers only, and faulthandler's is not one of them.
        return signals.getsignal(self.signal) is signals.SIG_DFL

    def _has_file(self) -> bool:
        return _inode(self.fd) == self.inode


_lock = threading.Lock()
_answering: _Answering | None = None


def let_ask() -> tuple[int, int]:
    """Lets other processes ask this one for its stack. Works in any thread; not collective.

    What an earlier call has set up stays, unless the script has since taken the signal or closed
    the file. A forked child answers nobody before it calls this itself.

    Returns:
        The number of the signal and the descriptor of the file, for :func:`ask`; (0, 0) if it is
        not possible.
    """
    global _answering
    with _lock:
        if _answering is not None and not _answering.works():
            _answering.stop()
            _answering = None
        if _answering is None:
            _answering = _begin()
        return (_answering.signal, _answering.fd) if _answering else (0, 0)


def answer() -> None:
    """Writes the stack of the main thread if another process has asked for it.

    To be called now and then by a thread of a process that lets others ask.
    """
    with _lock:
        fd = _answering.fd if _answering is not None else -1
        try:
            if fd < 0 or os.fstat(fd).st_size != len(_QUESTION):
                return
            lines = [f'  File "{f.file}", line {f.line} in {f.function}\n' for f in own()]
            os.ftruncate(fd, 0)
            os.write(fd, (_BEGIN + "".join(lines)).encode("ascii", "backslashreplace"))
        except OSError:
            return


def ask(
    pid: int, born: int, signal: int, fd: int, *, watched: bool = False, patience_s: float = 1.0
) -> list[Frame]:
    """Asks another process for the stack of its main thread. Works in any thread; not collective.

    System calls that the signal interrupts are restarted; those that never are, such as poll(2),
    Python repeats. A process that is stopped or dead is not asked.

    Args:
        pid: the process, of this process's pid namespace.
        born: when it began; see :func:`fastddp.watch.process.born`.
        signal: the signal that :func:`let_ask` has returned there.
        fd: the descriptor that :func:`let_ask` has returned there.
        watched: whether a thread there calls :func:`answer`, as far as is known. It is asked first.
        patience_s: how many seconds to wait for the answer, in either way.

    Returns:
        The innermost 100 frames, innermost first; none if there is no answer.
    """
    try:
        file = _open_file(pid, fd)
    except OSError:
        return []
    try:
        frames = _ask_thread(pid, born, file, patience_s) if watched else []
        if frames:
            return frames
        now = time.monotonic()
        deadline, calm_until = now + patience_s, now + _CALM_S
        # First another one's question is answered, or both answers would be one file.
        while _may_ask(pid, born, signal):
            sleeps = process.state_of(pid, born).kind is not process.Kind.RUNNING
            calm = sleeps or time.monotonic() > calm_until
            if calm and not _is_under_way(pid, signal):
                os.ftruncate(file, 0)
                return _answer(pid, signal, file, deadline)
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_S)
        return []
    except OSError:
        return []
    finally:
        os.close(file)


def _ask_thread(pid: int, born: int, file: int, patience_s: float) -> list[Frame]:
    """Asks the thread that calls :func:`answer`; returns nothing if there is no answer in time."""
    deadline = time.monotonic() + patience_s
    os.ftruncate(file, 0)
    os.pwrite(file, _QUESTION, 0)
    while time.monotonic() < deadline and process.state_of(pid, born).runs:
        if os.fstat(file).st_size > len(_QUESTION):
            time.sleep(_LOOK_S)  # it is truncated first, and then written at once
            frames = parse(os.pread(file, _MAX_BYTES, 0).decode("ascii", errors="replace"))
            if frames:  # else somebody else has just asked the same process
                return frames
        answer()  # that thread may be in here too, and wait for this one
        time.sleep(_LOOK_S)
    return []


def _begin() -> _Answering | None:
    signal = _free_signal()
    if signal is None:
        return None
    try:
        fd = _new_file()
    except OSError:
        return None
    try:
        faulthandler.register(signal, file=fd, all_threads=False, chain=False)
    except (OSError, RuntimeError):
        os.close(fd)
        return None
    return _Answering(signal, fd, _inode(fd))


def _forget() -> None:
    """Begins anew in a forked child, which has its parent's handler and file."""
    global _answering, _lock
    _lock = threading.Lock()
    if _answering is not None:
        _answering.stop()
        _answering = None


def _new_file() -> int:
    """Returns the descriptor of a new file in memory.

    Raises:
        OSError: if the system has no such files.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("the system has no files in memory")
    fd = os.memfd_create(_FILE, os.MFD_CLOEXEC)
    try:
        # Whoever asks truncates the file, and what is written next has to go to its new end.
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _candidates() -> Iterator[int]:
    """Yields signals, the best first.

    SIGURG does nothing where it is not caught, and so cannot harm a process that has just taken its
    handler back. Very few programs use it. Real-time signals would end such a process; Valgrind
    keeps the last one for itself.
    """
    yield signals.SIGURG
    yield from range(signals.SIGRTMAX - 1, signals.SIGRTMIN, -1)


def _free_signal() -> int | None:
    """Returns a signal that nobody in this process catches, ignores or blocks."""
    status = process.status_of(os.getpid())
    if not status:
        return None
    sets = ("SigCgt", "SigIgn", "SigBlk")
    for signal in _candidates():
        if not any(process.has_signal(status, name, signal) for name in sets):
            return signal
    return None


def _inode(fd: int) -> tuple[int, int]:
    try:
        found = os.fstat(fd)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def _open_file(pid: int, fd: int) -> int:
    """Opens the file of another process, which may have become another program by now.

    Raises:
        OSError: if the descriptor is another file's, or none's, or not to be opened.
    """
    path = f"/proc/{pid}/fd/{fd}"
    if not os.readlink(path).startswith(f"/memfd:{_FILE}"):
        raise OSError(f"{path} is not a file of stacks")
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _may_ask(pid: int, born: int, signal: int) -> bool:
    """Whether the signal would do no harm.

    It might end a process that does not catch it: one that is ending, another program that the
    process has become, another process with its pid. A process that does not run would find it
    when it continues, long after.
    """
    return process.state_of(pid, born).runs and process.catches(pid, signal)


def _is_under_way(pid: int, signal: int) -> bool:
    """Whether the signal waits for the main thread, or is blocked, as while its handler runs."""
    status = process.status_of(pid)
    return any(process.has_signal(status, name, signal) for name in ("SigPnd", "SigBlk"))


def _answer(pid: int, signal: int, file: int, deadline: float) -> list[Frame]:
    """Sends the signal and reads the stack from the file."""
    # To the main thread: kill(2) may choose another one.
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None or tgkill(pid, pid, signal) != 0:
        return []
    # Between the wait for the thread and the handler there is a moment that shows neither.
    while os.fstat(file).st_size == 0 or _is_under_way(pid, signal):
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_S)
    return parse(os.pread(file, _MAX_BYTES, 0).decode("ascii", errors="replace"))


_BEGIN = "Stack (most recent call first):\n"
_FRAME = re.compile(
    r'^  File (?:"(?P<file>.*)"|\?\?\?), line (?P<line>\d+|\?\?\?) in (?P<name>.*)\n', re.MULTILINE
)
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")


def parse(text: str) -> list[Frame]:
    """Reads the last stack that faulthandler has written.

    Args:
        text: what it has written, perhaps several times, perhaps in part.

    Returns:
        The stack, innermost first; empty if it is not there.
    """
    _, _, stack = text.rpartition(_BEGIN)
    frames = []
    for found in _FRAME.finditer(stack):
        number = int(found["line"]) if found["line"].isdigit() else 0
        frames.append(Frame(_unescape(found["file"] or "?"), number, _unescape(found["name"])))
    return frames


def _unescape(text: str) -> str:
    """Returns a name as Python has it; faulthandler writes ASCII only."""
    return _ESCAPE.sub(lambda found: chr(int(found[0][2:], 16)), text)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
