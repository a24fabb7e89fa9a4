"""Finds the compiled extension ``fastddp._C``, or says why it is not used.

The extension holds torch's C++ classes by value, so it works only with the torch that it was
compiled against; with another torch it may crash instead of raising. The version recorded at build
time is therefore compared *before* the library is opened. Nothing happens until :func:`load` is
called.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

BUILD = "run `pip install --no-build-isolation .` in fastddp's source tree"


class BuildInfo(NamedTuple):
    """What ``setup.py`` wrote into ``fastddp/_build_info.py``."""

    torch: str | None
    cuda: str | None
    archs: str | None
    compiler: str | None
    failed: str | None
    no_cuda: str | None = None
    """Why there are no CUDA kernels although torch is a CUDA build."""


def build_info() -> BuildInfo | None:
    """Returns what was recorded when fastddp was built, or None if it was never built."""
    try:
        module = importlib.import_module("fastddp._build_info")
    except ModuleNotFoundError:
        return None
    # A source tree built before a name was added to the record lacks that name.
    return BuildInfo(*(getattr(module, name.upper(), None) for name in BuildInfo._fields))


def load() -> ModuleType | None:
    """Returns ``fastddp._C``, or None if it cannot be used here; :func:`why_not` then says why."""
    return _find()[0]


def why_not() -> str | None:
    """Returns why the extension is not used, with the next step, or None if it is."""
    return _find()[1]


@functools.cache
def warn_once() -> None:
    """Warns, once per process, that the Python engine is used because there is no extension."""
    warnings.warn(
        f"fastddp uses its Python engine, because {why_not()}. Results are the same; each step is"
        " slower, as hooks, bucket copies and launches run one by one under the GIL.",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.cache
def _find() -> tuple[ModuleType | None, str | None]:
    import torch  # before the extension, which has no path of its own to torch's libraries

    built = build_info()
    running = str(torch.__version__)  # a string, because TorchVersion ignores parts such as +cpu
    if built is None:
        return None, f"the extension was never built; install g++, then {BUILD}"
    if built.failed is not None:  # the recorded reason ends with what to do first
        return None, f"the extension was not built: {built.failed}, then {BUILD}"
    if built.torch != running:
        return None, (
            f"the extension was built for torch {built.torch} and this is torch {running};"
            f" to build it for this one, {BUILD}"
        )
    try:
        return importlib.import_module("fastddp._C"), None
    except ImportError as error:
        return None, (
            f"the extension was built but cannot be loaded ({error}); to build it again, {BUILD}"
        )
