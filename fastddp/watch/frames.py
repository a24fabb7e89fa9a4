"""Stacks of Python frames: those of this process, and what a stack tells of a script."""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_MAX_FRAMES = 100  # as faulthandler
_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)
_PYTHONS = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
# Also that of another installation: a stack may come from another process.
_LIBRARY = re.compile(r"/lib\d*/python\d\.\d+t?/")
_GENERATED = re.compile(r"/torchinductor_")
_INSTALLED = re.compile(r"/(site|dist)-packages/")
_TYPED_IN = re.compile(r"^<(stdin|console|ipython-input|python-input|command-)")
_DEBUGGER = re.compile(
    r"/(pdb|bdb|ipdb|remote_pdb|web_pdb)\.py$|/_?pydevd|/(debugpy|ipdb|pudb)/"
    r"|/IPython/(core/debugger|terminal/)"
)
_ASKS = re.compile(r"(?<![\w.])(?:input|breakpoint)\s*\(|\bsys\.stdin\b")


@dataclass(frozen=True)
class Frame:
    """A place in a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{_near(self.file)}:{self.line} in {self.function}"


def own(thread_ident: int | None = None) -> list[Frame]:
    """Returns the stack of a thread of this process. Works in any thread.

    Args:
        thread_ident: the thread's ``ident``; the main thread if None.

    Returns:
        The innermost 100 frames, innermost first; none if there is no such thread, or if it runs
        no Python.
    """
    ident = threading.main_thread().ident if thread_ident is None else thread_ident
    # Frames keep their locals alive, so none of them is kept for longer than this loop.
    frame = None if ident is None else sys._current_frames().get(ident)
    if frame is not None and ident == threading.get_ident():
        frame = frame.f_back  # the caller
    frames: list[Frame] = []
    while frame is not None and len(frames) < _MAX_FRAMES:
        code = frame.f_code
        frames.append(Frame(code.co_filename, frame.f_lineno or 0, code.co_name))
        frame = frame.f_back
    return frames


def place_in_script(frames: Sequence[Frame]) -> Frame | None:
    """Returns the place in the user's script that a stack has come from.

    Args:
        frames: the stack, innermost first.

    Returns:
        The innermost frame that belongs neither to fastddp, torch, Python's library nor another
        installed package. If there is none, the innermost one of another installed package, or of
        all. None for an empty stack.
    """
    belongs: tuple[Callable[[str], bool], ...] = (_is_script, _is_code_in_a_string, _is_package)
    for does in belongs:
        for frame in frames:
            if does(frame.file):
                return frame
    return frames[0] if frames else None


def caller_in_script(frames: Sequence[Frame]) -> Frame | None:
    """Returns the place in the user's script from which :func:`place_in_script` was called.

    Args:
        frames: the stack, innermost first.

    Returns:
        The next frame of the script outside of that place, or None.
    """
    in_script = [frame for frame in frames if _is_script(frame.file)]
    return in_script[1] if len(in_script) > 1 else None


def is_at_breakpoint(frames: Sequence[Frame]) -> bool:
    """Returns whether a stack is that of a thread that waits for a person.

    That is a debugger's prompt, on this rank or through :func:`torch.distributed.breakpoint` on
    another one, or a line that reads from the terminal. A script that merely runs under a debugger
    has the debugger's frames outside of its own, and does not count.

    Args:
        frames: the stack, innermost first.
    """
    for frame in frames:
        if _DEBUGGER.search(frame.file) or _is_breakpoint_of_torch(frame):
            return True
        if _is_script(frame.file) or _is_code_in_a_string(frame.file):
            break
    return bool(frames) and bool(_ASKS.search(linecache.getline(frames[0].file, frames[0].line)))


def is_at_end(frames: Sequence[Frame]) -> bool:
    """Returns whether a stack is that of a main thread that is through, and joins other threads.

    Args:
        frames: the stack, innermost first.
    """
    outermost = frames[-1] if frames else Frame("", 0, "")
    return outermost.function == "_shutdown" and Path(outermost.file).name == "threading.py"


def _near(file: str) -> str:
    """Returns a shorter name of a file below the working directory."""
    try:
        here = os.path.join(os.getcwd(), "")
    except OSError:  # the directory has been removed
        return file
    return file.removeprefix(here)


def _is_breakpoint_of_torch(frame: Frame) -> bool:
    return frame.function == "breakpoint" and frame.file == os.path.join(
        _TORCH, "distributed", "__init__.py"
    )


def _is_ours_or_torch(file: str) -> bool:
    return file.startswith((_OURS + os.sep, _TORCH + os.sep)) or "/site-packages/torch/" in file


def _is_script(file: str) -> bool:
    if file.startswith("<"):
        return bool(_TYPED_IN.match(file))
    return not (
        _is_ours_or_torch(file)
        or file.startswith(_PYTHONS)
        or _LIBRARY.search(file)
        or _GENERATED.search(file)
        or _INSTALLED.search(file)
    )


def _is_code_in_a_string(file: str) -> bool:
    """Whether it may be ``python -c``; generated code, as that of a dataclass, says the same."""
    return file == "<string>"


def _is_package(file: str) -> bool:
    return bool(_INSTALLED.search(file)) and not _is_ours_or_torch(file)
