"""Order among the streams of a device. The CPU has no streams, so there these do nothing.

Autograd runs a hook on the stream that its parameter's gradient belongs to, so one bucket may be
filled from several streams. Code that reads the bucket has to wait for each of them; without that
it would read memory before it is written. ``csrc/tensor/streams.h`` is the same in C++.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


def has_streams(device: torch.device) -> bool:
    """Returns whether work on ``device`` is queued, so that a call returns before it is done."""
    return device.type not in ("cpu", "meta")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current device of its type inside a ``with`` block.

    A script may move its model to a GPU and leave the first GPU the current one. If all ranks do
    that, collectives would run on the first GPU for all of them, and NCCL refuses two ranks on one
    GPU.
    """
    if not has_streams(device):
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def drain_current_stream(device: torch.device) -> None:
    """Blocks until the device has done all work that is queued on the current stream."""
    if has_streams(device):
        torch.accelerator.current_stream(device).synchronize()


def home_of(device: torch.device) -> torch.Stream | None:
    """Returns the stream that memory allocated now belongs to; None on a device without streams."""
    return torch.accelerator.current_stream(device) if has_streams(device) else None


def keep_for_current(tensors: Iterable[torch.Tensor], home: torch.Stream | None) -> None:
    """Keeps the memory of tensors from being reused before the current stream is done with it.

    The allocator reuses freed memory at once on the stream that it was allocated on. Without this
    it would not know that another stream still reads the memory.

    Args:
        tensors: the tensors that the current stream uses.
        home: the stream that their memory was allocated on; None on a device without streams.
    """
    if home is None:
        return
    for tensor in tensors:
        stream = torch.accelerator.current_stream(tensor.device)
        if stream != home:
            tensor.record_stream(stream)


def is_capturing(device: torch.device) -> bool:
    """Returns whether work that is launched now is recorded into a CUDA graph instead of run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class LateCopy:
    """A copy of a device's tensor to the host, made while the host goes on.

    Attributes:
        copy: the tensor on the host. Its values may be read once :meth:`is_there` says so.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.copy = tensor.to("cpu", non_blocking=True)
        self._done = torch.Event(device=tensor.device)
        self._done.record(torch.accelerator.current_stream(tensor.device))

    def is_there(self) -> bool:
        """Returns whether the values of ``copy`` have arrived."""
        return bool(self._done.query())

    def wait(self) -> None:
        """Blocks until the values of ``copy`` have arrived."""
        self._done.synchronize()


class Touched:
    """The streams that have worked on something."""

    def __init__(self) -> None:
        self._streams: list[torch.Stream] = []

    def by_current(self, device: torch.device) -> None:
        """Notes that the current stream works on it."""
        if has_streams(device):
            stream = torch.accelerator.current_stream(device)
            if stream not in self._streams:
                self._streams.append(stream)

    def by_current_after_all(self, device: torch.device) -> None:
        """Makes the current stream wait for what the noted streams have been given so far.

        From then on the current stream alone is noted: whoever waits for it waits for all.
        """
        if not has_streams(device):
            return
        stream = torch.accelerator.current_stream(device)
        for other in self._streams:
            if other != stream:
                stream.wait_stream(other)
        self._streams = [stream]
