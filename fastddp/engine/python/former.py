"""Memory that no round uses any more, but that a collective or a graph may still write to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from fastddp.comm.loans import Loan
from fastddp.device.streams import drain_current_stream, has_streams
from fastddp.engine.hooks import Wait
from fastddp.engine.python.buckets import Buckets


class Former:
    """Buckets that are not installed any more, until it is safe to drop them.

    Args:
        device: the device of the buckets.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buckets: list[Buckets] = []
        self._of_graphs: list[Buckets] = []  # a graph goes on to write to these
        self._abandoned: list[Wait] = []  # for collectives that may still write to some

    def keep(self, buckets: Buckets | None, waits: Iterable[Wait] = ()) -> None:
        """Keeps buckets until :meth:`release`.

        On a GPU, memory can be used by others as soon as it is dropped here, so the collectives in
        flight are waited for first. On the CPU, the transport holds the memory that it writes to.

        Args:
            buckets: the buckets that were installed until now, if there were any.
            waits: functions that wait for the collectives in flight.
        """
        if buckets is not None:
            self._buckets.append(buckets)
        if has_streams(self._device):
            self._abandoned += waits

    def release(self) -> None:
        """Frees the buckets before new ones are allocated, unless a graph refers to them."""
        abandoned, self._abandoned = self._abandoned, []
        for wait in abandoned:
            with contextlib.suppress(RuntimeError):  # of a backward that raised anyway
                wait()
        drain_current_stream(self._device)  # whatever stream the old buckets were used on
        self._of_graphs += [buckets for buckets in self._buckets if buckets.is_captured]
        self._buckets.clear()

    def loans(self) -> Iterator[Loan]:
        """Yields the loans that have to be settled before the memory is dropped."""
        for buckets in self._buckets:
            yield from buckets.loans()
