"""Threads of the script besides the main one: what they will call next is not known."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

import torch

_OURS = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_TORCH_COMMUNICATES = os.path.join(_TORCH, "distributed") + os.sep
_PYTHONS = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
# Packages with threads of their own that show or log something, and never communicate.
_SILENT = re.compile(r"/(tqdm|wandb|tensorboard|IPython|ipykernel|debugpy|_?pydevd\w*|zmq|psutil)/")
_INSTALLED = re.compile(r"/(site|dist)-packages/")


def may_begin_collectives() -> bool:
    """Returns whether a thread besides the main one might begin a collective soon.

    It might if it is anywhere in the script, in an installed package, or in torch.distributed, such
    as one that saves a checkpoint and then meets the other ranks. Threads that only another thread
    can wake, or that are in Python's library alone, do not count, and neither do those of fastddp.
    Works in any thread.
    """
    main = threading.main_thread().ident
    frames = sys._current_frames()
    try:
        return any(_may(frame) for ident, frame in frames.items() if ident != main)
    finally:
        # The frame of this call is among them, and would keep them all until the next collection of
        # garbage; with them the locals of the main thread, such as tensors that are lent.
        frames.clear()


def _may(frame: FrameType | None) -> bool:
    if _waits_for_a_thread(frame):
        return False
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    files = [file for file in reversed(files) if not _is_pythons(file)]
    if not files or files[0].startswith(_OURS):
        return False
    return any(_is_unknown(file) for file in files)


def _waits_for_a_thread(frame: FrameType | None) -> bool:
    """Whether a thread waits without a timeout for an event, a queue or the end of a thread."""
    if frame is None or frame.f_code.co_filename != threading.__file__:
        return False
    if frame.f_code.co_name not in ("wait", "join", "_wait_for_tstate_lock"):
        return False
    scope = frame.f_locals
    return (scope.get("timeout") if "timeout" in scope else -1) in (None, -1)


def _is_pythons(file: str) -> bool:
    if _INSTALLED.search(file):
        return False
    return file.startswith((*_PYTHONS, "<frozen "))


def _is_unknown(file: str) -> bool:
    if file.startswith((_OURS, _TORCH)):
        return file.startswith(_TORCH_COMMUNICATES)
    return not _SILENT.search(file)
