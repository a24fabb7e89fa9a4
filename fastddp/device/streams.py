"""Order among the streams of a device; on the CPU, which has none, nothing here does anything.

Autograd runs a hook on the stream that its parameter's gradient belongs to, so one bucket may be
filled from several. Whoever reads it has to wait for each of them. ``csrc/tensor/streams.h`` is the
same in C++.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


def has_streams(device: torch.device) -> bool:
    """Returns whether work on ``device`` is queued, and not done when a call returns."""
    return device.type not in ("cpu", "meta")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one of its type in a ``with`` block.

    A rank whose model is on its GPU may have left the first one current, as every rank has then;
    NCCL refuses two ranks on one GPU.
    """
    if not has_streams(device):
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def drain_current_stream(device: torch.device) -> None:
    """Returns once the device has done all that the current stream was given."""
    if has_streams(device):
        torch.accelerator.current_stream(device).synchronize()


def home_of(device: torch.device) -> torch.Stream | None:
    """Returns the stream that memory allocated now belongs to; None where there are none."""
    return torch.accelerator.current_stream(device) if has_streams(device) else None


def keep_for_current(tensors: Iterable[torch.Tensor], home: torch.Stream | None) -> None:
    """Keeps the memory of tensors from being used anew before the current stream is done with it.

    Freed memory is used anew at once by the stream that it was allocated on, which is ``home``.
    """
    if home is None:
        return
    for tensor in tensors:
        stream = torch.accelerator.current_stream(tensor.device)
        if stream != home:
            tensor.record_stream(stream)


def is_capturing(device: torch.device) -> bool:
    """Returns whether what is launched now is recorded into a graph and not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class LateCopy:
    """A device's tensor on its way to the host, which goes on meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.copy = tensor.to("cpu", non_blocking=True)
        self._done = torch.Event(device=tensor.device)
        self._done.record(torch.accelerator.current_stream(tensor.device))

    def is_there(self) -> bool:
        """Returns whether ``copy`` has its values."""
        return bool(self._done.query())

    def wait(self) -> None:
        """Returns once it has."""
        self._done.synchronize()


class Touched:
    """The streams that have worked on something."""

    def __init__(self) -> None:
        self._streams: list[torch.Stream] = []

    def by_current(self, device: torch.device) -> None:
        """Takes note of the current stream."""
        if has_streams(device):
            stream = torch.accelerator.current_stream(device)
            if stream not in self._streams:
                self._streams.append(stream)

    def by_current_after_all(self, device: torch.device) -> None:
        """Has the current stream wait for the others' work so far; then only it has to be noted."""
        if not has_streams(device):
            return
        stream = torch.accelerator.current_stream(device)
        for other in self._streams:
            if other != stream:
                stream.wait_stream(other)
        self._streams = [stream]
