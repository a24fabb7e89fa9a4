"""Order among the streams of a device; on the CPU, which has none, nothing here does anything.

Autograd runs a hook on the stream that its parameter's gradient belongs to, so one bucket may be
filled from several. Whoever reads it has to wait for each of them. ``csrc/torch/streams.h`` is the
same in C++.
"""

from __future__ import annotations

import torch


def has_streams(device: torch.device) -> bool:
    """Returns whether work on ``device`` is queued, and not done when a call returns."""
    return device.type not in ("cpu", "meta")


def drain_current_stream(device: torch.device) -> None:
    """Returns once the device has done all that the current stream was given."""
    if has_streams(device):
        torch.accelerator.current_stream(device).synchronize()


def is_capturing(device: torch.device) -> bool:
    """Returns whether what is launched now is recorded into a graph and not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


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
                stream.wait_event(other.record_event())
        self._streams = [stream]
