"""What is installed here and what :func:`fastddp.wrap` would choose, for people and bug reports."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastddp import config, extension
from fastddp.device import memory
from fastddp.version import __version__


@dataclass(frozen=True)
class Choice:
    """One thing that :func:`fastddp.wrap` would choose here, and the reason.

    Attributes:
        what: the choice, such as ``native`` or ``cuda:0``; ``none`` where there is no choice.
        why: the reason for the choice, or the error that :func:`fastddp.wrap` would raise.
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}  ({self.why})"


@dataclass(frozen=True)
class Info:
    """The answer of :func:`info`, made to be printed."""

    version: str
    """The version of fastddp."""
    torch: str
    """The version of the torch that is running."""
    extension: str | None
    """The torch and the compiler that the extension was built with; None if it is not used."""
    why_no_extension: str | None
    """The reason why the extension is not used, with the next step; None if it is used."""
    cuda_kernels: str
    """The CUDA version and architectures that they were built for, or ``none`` and the reason."""
    engines: tuple[str, ...]
    """The engines that can run here."""
    backends: tuple[str, ...]
    """The c10d backends that this torch has."""
    cuda_devices: int
    """The number of CUDA devices that torch sees."""
    launcher: str
    """The launcher that made this process a rank, and which rank; ``none``, or what is wrong."""
    engine: Choice
    """The engine that gradients would be averaged by."""
    device: Choice
    """The device that a model would be moved to."""
    process_group: Choice
    """The group of ranks that would train the model."""
    memory: Choice
    """What happens to the memory of large CPU tensors, see :mod:`fastddp.memory`."""

    def __str__(self) -> str:
        rows = {
            "torch": self.torch,
            "extension": self.extension or f"not used: {self.why_no_extension}",
            "CUDA kernels": self.cuda_kernels,
            "engines": ", ".join(self.engines),
            "c10d backends": ", ".join(self.backends) or "none",
            "CUDA devices": self.cuda_devices,
            "launcher": self.launcher,
        }
        choices = {
            "engine": self.engine,
            "device": self.device,
            "process group": self.process_group,
            "freed memory": self.memory,
        }
        lines = [
            f"fastddp {self.version}",
            *(f"  {name:<14} {value}" for name, value in rows.items()),
            "wrap() would choose",
            *(f"  {name:<14} {value}" for name, value in choices.items()),
        ]
        return "\n".join(lines)


def info() -> Info:
    """Reports what is installed and what :func:`fastddp.wrap` would choose in this process.

    It makes no process group and opens no device. It is not collective, may be called from any
    thread, and puts problems into the report instead of raising them.

    Returns:
        A report with a field for each fact; ``print`` shows it as a table.
    """
    engine, device, process_group = _engine(), _device(), _process_group()
    return Info(
        version=__version__,
        torch=str(torch.__version__),
        extension=_extension(),
        why_no_extension=extension.why_not(),
        cuda_kernels=_cuda_kernels(),
        engines=("native", "python") if extension.load() else ("python",),
        backends=_backends(),
        cuda_devices=torch.cuda.device_count(),
        launcher=_launcher(),
        engine=engine,
        device=device,
        process_group=process_group,
        memory=_memory(),
    )


def _extension() -> str | None:
    built = extension.build_info()
    if extension.load() is None or built is None:
        return None
    return f"built for torch {built.torch}, by {built.compiler}"


def _cuda_kernels() -> str:
    built = extension.build_info()
    if extension.load() is None or built is None:
        return "none: there is no extension"
    if built.cuda is not None:
        return f"built with CUDA {built.cuda} for {built.archs}"
    if built.no_cuda is not None:
        return f"none: {built.no_cuda}, then {extension.BUILD}"
    return "none: torch is not a CUDA build" if torch.version.cuda is None else "none"


def _backends() -> tuple[str, ...]:
    if not dist.is_available():
        return ()
    names = dist.Backend.backend_list
    return tuple(n for n in names if n != "undefined" and dist.is_backend_available(n))


def _engine() -> Choice:
    from fastddp.engine.choose import choose

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the report says the same
            chosen = choose()
    except (RuntimeError, ValueError) as error:
        return Choice("none", str(error))
    if os.environ.get("FASTDDP_ENGINE"):
        return Choice(chosen, f"FASTDDP_ENGINE={chosen}")
    return Choice(chosen, extension.why_not() or "the extension fits this torch")


def _launcher() -> str:
    from fastddp.comm.environment import describe_environment

    try:
        environment = describe_environment()
    except (RuntimeError, ValueError) as error:
        return str(error)
    if not environment.launched:
        return "none" if config.launcher() else "none  (FASTDDP_LAUNCHER=0)"
    text = f"{environment.launcher}: rank {environment.rank} of {environment.world_size}"
    if environment.local_rank is not None:
        text += f", local rank {environment.local_rank}"
    meeting = environment.meeting
    if meeting is not None and environment.world_size != 1:
        text += f"; ranks meet at {meeting.host}:{meeting.port}"
    return text


def _device() -> Choice:
    from fastddp.comm.environment import find_cuda_device, find_local_rank

    if not torch.cuda.is_available():
        return Choice("cpu", "torch sees no CUDA device")
    try:
        local_rank = find_local_rank()
    except (RuntimeError, ValueError) as error:
        return Choice("none", str(error))
    if local_rank is None:
        return Choice("cuda:0", "LOCAL_RANK is not set")
    index = find_cuda_device(local_rank)
    if index is None:
        return Choice("none", f"there is no GPU for local rank {local_rank}")
    return Choice(f"cuda:{index}", f"local rank {local_rank}")


def _memory() -> Choice:
    try:
        against = memory.why_not()
    except ValueError as error:
        return Choice("none", str(error))
    if against is not None:
        return Choice("left to torch's allocator", against)
    return Choice("kept between steps", "for models on the CPU, with two ranks or more")


def _process_group() -> Choice:
    from fastddp.comm.environment import describe_environment
    from fastddp.comm.launch import default_backend

    if not dist.is_available():
        return Choice("none", "this torch was built without torch.distributed")
    if dist.is_initialized():
        ranks = f"rank {dist.get_rank()} of {dist.get_world_size()}"
        return Choice("the default group", f"it exists: {dist.get_backend()}, {ranks}")
    try:
        environment = describe_environment()
    except (RuntimeError, ValueError) as error:
        return Choice("none", str(error))
    if not environment.launched:
        return Choice("none", "no launcher started it as a rank: one process, nothing to reduce")
    return Choice(
        f"a new group, {default_backend()}",
        f"launched as rank {environment.rank} of {environment.world_size}",
    )
