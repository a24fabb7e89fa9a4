"""Two devices whose streams are checked: torch's PrivateUse1 under the name ``standin``.

Memory is the host's and every operator runs at once, so values are always right; what is recorded
is what a GPU would be free to reorder. ``checker.h`` states the rules. A process that has called
:func:`load` keeps the device for good, so tests do it in a rank of their own (``run_ranks``).

    device.load()
    x = torch.ones(3, device="standin")
    with device.stream("side"):
        y = x + 1                      # no event between the two
    [race] = device.findings()
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastddp.device import streams
from fastddp.engine.python import reducer as python_engine

NAME = "standin"
_HERE = Path(__file__).parent
_SOURCES = ("standin.cpp", "checker.h")
_FLAGS = ("-std=c++20", "-O0", "-g0", "-fPIC", "-shared", f"-DTORCH_EXTENSION_NAME={NAME}_device")


@dataclass(frozen=True)
class Finding:
    """A use of memory that a GPU would be free to get wrong."""

    kind: str
    """``race``, ``uninitialised read`` or ``premature free``."""
    text: str


@dataclass(frozen=True)
class HostSync:
    """The host has waited for the device."""

    what: str
    where: str
    """The innermost line of Python."""
    in_backward: bool


# ---- building and loading ------------------------------------------------------------------------


def why_not() -> str | None:
    """Returns why the device cannot be built here, or None if it can."""
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler {_compiler()!r} (set CXX) to build the stand-in device with"
    return None


def build() -> Path:
    """Compiles the device, unless these very sources have been; returns the library. 10 s."""
    library = _library()
    if library.exists():
        return library
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()[0]
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [_compiler(), *_FLAGS, *(f"-isystem{path}" for path in includes)]
    command += [str(_HERE / "standin.cpp"), "-o", str(unfinished), f"-L{libraries}"]
    command += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the stand-in device does not compile:\n{done.stderr}")
    unfinished.replace(library)  # at once: another test run may be building it too
    return library


@functools.cache
def load() -> None:
    """Makes ``standin`` a device of this process; :func:`build` must have been called."""
    torch.utils.rename_privateuse1_backend(NAME)
    global _device
    name = f"{NAME}_device"
    loader = importlib.machinery.ExtensionFileLoader(name, str(_library()))
    spec = importlib.util.spec_from_file_location(name, str(_library()), loader=loader)
    assert spec is not None
    _device = importlib.util.module_from_spec(spec)
    loader.exec_module(_device)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.device_count = _device.num_devices  # type: ignore[attr-defined]
    module.current_device = _device.current_device  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = lambda _: None  # type: ignore[attr-defined]
    torch._register_device_module(NAME, module)


_device: Any = None


def _library() -> Path:
    digest = hashlib.sha256(" ".join((torch.__version__, _compiler(), *_FLAGS)).encode())
    for source in _SOURCES:
        digest.update((_HERE / source).read_bytes())
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    folder = _HERE.parents[1] / "build" / NAME
    return folder / f"{NAME}_device-{digest.hexdigest()[:16]}{suffix}"


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


# ---- what tests use ------------------------------------------------------------------------------


def stream(name: str, index: int = 0) -> torch.Stream:
    """Returns a new stream of a device; findings call it ``name``."""
    made = torch.Stream(device=f"{NAME}:{index}")
    _device.name_stream(made.stream_id, name)
    return made


@contextlib.contextmanager
def label(text: str) -> Iterator[None]:
    """Has findings say that what this thread launches now was part of ``text``."""
    _device.push_label(text)
    try:
        yield
    finally:
        _device.pop_label()


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Says to whoever asks that a graph is being captured. What is launched runs all the same."""
    _device.set_capturing(True)
    python_engine.is_capturing = lambda _: True
    try:
        yield
    finally:
        _device.set_capturing(False)
        python_engine.is_capturing = streams.is_capturing


def findings() -> list[Finding]:
    """Returns what was found since the last call."""
    return [Finding(*found) for found in _device.take_findings()]


def host_syncs() -> list[HostSync]:
    """Returns the host's waits since the last call."""
    return [HostSync(*waited) for waited in _device.take_host_syncs()]
