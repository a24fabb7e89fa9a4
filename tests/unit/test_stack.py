"""Stacks of other processes, in whatever state these are, and of this one."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from fastddp.watch import process, stack
from fastddp.watch.stack import Frame
from tests.unit.forks import Asked, Forks

linux = pytest.mark.skipif(sys.platform != "linux", reason="stacks are read through /proc")

DEADLINE_S = 60.0
SLEEPS = """
def slumber():
    time.sleep(600)

import time
let_ask()
slumber()
"""


def ask_until(asked: Asked, function: str) -> list[Frame]:
    """Ask until the innermost frame is that of a function."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        frames = stack.ask(*asked, patience_s=DEADLINE_S)
        assert frames, "no answer"
        if frames[0].function == function:
            return frames
        assert time.monotonic() < deadline, frames
        time.sleep(0.01)


def size(asked: Asked) -> int:
    return os.stat(f"/proc/{asked.pid}/fd/{asked.fd}").st_size


@linux
def test_a_process_that_sleeps(children: Forks) -> None:
    path = children.start(SLEEPS)
    asked = children.read_asked()
    frames = ask_until(asked, "slumber")
    assert frames[:2] == [Frame(path, 3, "slumber"), Frame(path, 7, "<module>")]
    assert stack.place_in_script(frames) == frames[0]
    assert stack.ask(*asked) == frames  # the first answer is not left in front of the second


@linux
@pytest.mark.parametrize(
    "held",
    [
        "re.match(r'(a+)+$', 'a' * 60 + 'b')",
        # The signal ends the sleep, and the next one begins at once.
        "[ctypes.PyDLL(None).sleep(600) for _ in iter(int, 1)]",
    ],
)
def test_a_process_that_holds_the_gil_in_c(children: Forks, held: str) -> None:
    path = children.start(f"""
import ctypes, re, threading, time
ticks = []
def tick():
    while True:
        ticks.append(0)
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
let_ask()
while True:
    {held}
""")
    asked = children.read_asked()
    deadline = time.monotonic() + DEADLINE_S
    while not (place := stack.place_in_script(stack.ask(*asked))) or place.line != 11:
        assert time.monotonic() < deadline, place
    assert place.file == path


ANSWERS = """
import time
from threading import Thread
from fastddp.watch import stack
def answer_now_and_then():
    while True:
        stack.answer()
        time.sleep(0.05)
Thread(target=answer_now_and_then, daemon=True).start()
"""


@linux
def test_a_thread_of_the_process_answers_first(children: Forks) -> None:
    children.start(ANSWERS + SLEEPS)
    asked = children.read_asked()
    frames = ask_until(asked, "slumber")
    assert stack.ask(*asked, watched=True, patience_s=DEADLINE_S) == frames
    # Without the signal, which the other way needs.
    assert stack.ask(*asked._replace(signal=0), watched=True, patience_s=DEADLINE_S) == frames


@linux
def test_a_thread_that_does_not_answer_is_not_needed(children: Forks) -> None:
    children.start(SLEEPS)
    asked = children.read_asked()
    frames = ask_until(asked, "slumber")
    assert stack.ask(*asked, watched=True, patience_s=0.2) == frames


@linux
def test_a_process_that_is_stopped(children: Forks) -> None:
    children.start(SLEEPS)
    asked = children.read_asked()
    ask_until(asked, "slumber")
    os.kill(asked.pid, signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE_S
    while process.state_of(asked.pid, asked.born).kind is not process.Kind.STOPPED:
        assert time.monotonic() < deadline
    for _ in range(3):
        assert stack.ask(*asked, patience_s=DEADLINE_S) == []
    assert time.monotonic() < deadline  # it has not waited for what cannot come
    status = process.status_of(asked.pid)
    assert not process.has_signal(status, "SigPnd", asked.signal)
    # It may be stopped just when it has been asked.
    os.kill(asked.pid, asked.signal)
    os.kill(asked.pid, signal.SIGCONT)
    assert ask_until(asked, "slumber")[0].line == 3
    assert asked.lives()


@linux
def test_a_process_that_does_not_answer_in_time(children: Forks) -> None:
    children.start(
        "import signal\n"
        "let_ask()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "tell()\n" + SLEEPS.replace("let_ask()", "")
    )
    asked = children.read_asked()
    assert children.read() == []
    started = time.monotonic()
    assert stack.ask(*asked, patience_s=0.2) == []
    assert 0.2 <= time.monotonic() - started < DEADLINE_S


@linux
def test_another_program_is_not_ended(children: Forks) -> None:
    # A real-time signal ends a program that does not catch it, and the file is there still.
    children.start("""
import os, signal
signal.signal(signal.SIGURG, lambda *_: None)
let_ask()
from fastddp.watch import stack
os.set_inheritable(stack.let_ask()[1], True)
os.execvp("sleep", ["sleep", "600"])
""")
    asked = children.read_asked()
    assert asked.signal > signal.SIGRTMIN
    deadline = time.monotonic() + DEADLINE_S
    while process.catches(asked.pid, asked.signal):
        assert time.monotonic() < deadline
    assert size(asked) == 0
    assert stack.ask(*asked) == []
    time.sleep(0.05)
    assert asked.lives()


@linux
def test_another_program_does_not_inherit_the_file(children: Forks) -> None:
    children.start("""
import os
let_ask()
os.execvp("sleep", ["sleep", "600"])
""")
    asked = children.read_asked()
    deadline = time.monotonic() + DEADLINE_S
    while process.catches(asked.pid, asked.signal):
        assert time.monotonic() < deadline
    assert not os.path.lexists(f"/proc/{asked.pid}/fd/{asked.fd}")


@linux
def test_a_pid_that_another_process_has_now(children: Forks) -> None:
    children.start(SLEEPS)
    asked = children.read_asked()
    assert stack.ask(*asked._replace(born=asked.born - 1)) == []
    assert size(asked) == 0
    assert stack.ask(*asked._replace(pid=2**22 + 1)) == []


@linux
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_that_the_script_uses(children: Forks, when: str) -> None:
    children.start(
        "import signal\n"
        "from fastddp.watch import stack\n"
        f"if {when == 'after'}: assert stack.let_ask()[0] == signal.SIGURG\n"
        "signal.signal(signal.SIGURG, lambda *_: tell('caught'))\n" + SLEEPS
    )
    asked = children.read_asked()
    assert asked.signal != signal.SIGURG
    assert process.catches(asked.pid, signal.SIGURG)
    ask_until(asked, "slumber")
    os.kill(asked.pid, signal.SIGURG)
    assert children.read() == ["caught"]


@linux
def test_a_file_that_the_script_has_closed(children: Forks, tmp_path: Path) -> None:
    mine, go_on = tmp_path / "mine", tmp_path / "go on"
    path = children.start(f"""
import os, time
from fastddp.watch import stack
let_ask()
fd = stack.let_ask()[1]
os.close(fd)
os.dup2(os.open({str(mine)!r}, os.O_RDWR | os.O_CREAT), fd)
os.write(fd, b"precious")
tell()
while not os.path.exists({str(go_on)!r}):
    time.sleep(0.01)
let_ask()
time.sleep(600)
""")
    asked = children.read_asked()
    assert children.read() == []
    assert stack.ask(*asked) == []
    go_on.touch()
    again = children.read_asked()
    assert again.fd != asked.fd
    assert path in [frame.file for frame in stack.ask(*again, patience_s=DEADLINE_S)]
    assert mine.read_bytes() == b"precious"


@linux
def test_many_threads_and_a_deep_stack(children: Forks) -> None:
    path = children.start("""
import threading, time
def deep(left):
    if left:
        deep(left - 1)
    else:
        slumber()
def slumber():
    time.sleep(600)
for _ in range(150):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
let_ask()
deep(300)
""")
    frames = ask_until(children.read_asked(), "slumber")
    assert frames == [
        Frame(path, 9, "slumber"),
        Frame(path, 7, "deep"),
        *[Frame(path, 5, "deep")] * 98,
    ]


@linux
def test_a_forked_child_answers_for_itself(children: Forks) -> None:
    path = children.start("""
import os, time
from fastddp.watch import process, stack
signal, fd = stack.let_ask()
let_ask()
def child_sleeps():
    time.sleep(600)
if os.fork() == 0:
    try:
        os.fstat(fd)
    except OSError as error:
        tell(error.errno, process.catches(os.getpid(), signal))
    let_ask()
    child_sleeps()
os.wait()
""")
    parent = children.read_asked()
    assert children.read() == [errno.EBADF, False]
    child = children.read_asked()
    assert child.signal == parent.signal
    assert ask_until(child, "child_sleeps")[0].file == path
    assert size(parent) == 0
    ask_until(parent, "<module>")


@linux
def test_faulthandler_goes_on_for_the_script(children: Forks) -> None:
    children.start("""
import faulthandler, signal, tempfile, time
crashes, late, asked = (tempfile.TemporaryFile() for _ in range(3))
faulthandler.enable(file=crashes)
faulthandler.register(signal.SIGUSR1, file=asked, chain=False)
faulthandler.dump_traceback_later(0.2, file=late)
let_ask()
signal.raise_signal(signal.SIGUSR1)
while not late.seek(0, 2):
    time.sleep(0.01)
tell(faulthandler.is_enabled(), asked.seek(0, 2) > 0)
time.sleep(600)
""")
    asked = children.read_asked()
    assert stack.ask(*asked, patience_s=DEADLINE_S)
    assert children.read() == [True, True]


@linux
def test_two_who_ask_at_the_same_time(children: Forks) -> None:
    children.start(SLEEPS)
    asked = children.read_asked()
    expected = ask_until(asked, "slumber")
    answers: list[list[Frame]] = []

    def ask() -> None:
        answers.append(stack.ask(*asked, patience_s=DEADLINE_S))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever truncates the file while another one's answer is written shortens that.
    assert all(answer[-1] == expected[-1] for answer in answers if answer)
    assert stack.ask(*asked, patience_s=DEADLINE_S) == expected


@linux
def test_asking_again_and_again_harms_nobody(children: Forks) -> None:
    children.start("""
import threading
def deep(left):
    return deep(left - 1) + 1 if left else sum(range(50))
def run():
    while True:
        deep(200)
threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
let_ask()
run()
""")
    asked = children.read_asked()
    answers = [stack.ask(*asked, patience_s=DEADLINE_S) for _ in range(100)]
    assert all(answers)
    assert asked.lives()
    assert size(asked) < 100_000


def test_let_ask_is_done_once() -> None:
    try:
        first = stack.let_ask()
        assert stack.let_ask() == first
        if sys.platform == "linux":
            assert not os.get_inheritable(first[1])
    finally:
        stack._forget()
    if sys.platform == "linux":
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(first[1])
        assert not process.catches(os.getpid(), first[0])


def test_where_nothing_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert stack.let_ask() == (0, 0)
    assert stack.ask(os.getpid(), 0, 0, 0) == []


WRITTEN = """\
Stack (most recent call first):
  Garbage-collecting
  File "tr\\xe4in \\u0444.py", line 22 in main
  File ???, line ??? in ???
  File "train.py", line 30 in <module>
  ...
"""


def test_what_faulthandler_writes() -> None:
    frames = [
        Frame("träin ф.py", 22, "main"),
        Frame("?", 0, "???"),
        Frame("train.py", 30, "<module>"),
    ]
    assert stack.parse(WRITTEN) == frames
    assert stack.parse(WRITTEN + WRITTEN) == frames
    assert stack.parse(WRITTEN[40:] + WRITTEN) == frames
    assert stack.parse(WRITTEN[:-12]) == frames[:2]
    assert stack.parse("Stack (most recent call first):\n  <no Python frame>\n") == []


def test_own_stack() -> None:
    frame = stack.own()[0]
    assert frame.function == "test_own_stack"
    assert str(frame) == f"tests/unit/test_stack.py:{frame.line} in test_own_stack"


def test_stack_of_another_thread_and_nothing_is_kept_alive() -> None:
    class Kept:
        pass

    begun, end = threading.Event(), threading.Event()
    refs: list[weakref.ref[Kept]] = []

    def in_thread() -> None:
        kept = Kept()
        refs.append(weakref.ref(kept))
        begun.set()
        end.wait()

    thread = threading.Thread(target=in_thread)
    thread.start()
    begun.wait()
    frames = stack.own(thread.ident)
    assert "in_thread" in [frame.function for frame in frames]
    end.set()
    thread.join()
    assert refs[0]() is None
    assert stack.own(thread.ident) == []
