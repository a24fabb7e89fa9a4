"""A model's buffers, kept equal on all ranks: by broadcast, or by a hook of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastddp.comm.broadcast import BroadcastBuffer
from fastddp.comm.labels import labelled
from fastddp.comm.waiting import waiting
from fastddp.ddp.agreement import check_layout
from fastddp.ddp.model import Model
from fastddp.ddp.ranks import Ranks
from fastddp.engine.hooks import await_future

Future = torch.futures.Future[Any]


@dataclass(frozen=True, slots=True)
class BufferHook:
    """What is done with the buffers in place of a broadcast."""

    hook: Callable[[Any, Mapping[str, torch.Tensor]], Any]
    """Called with the state and the buffers by name. May return futures, which are waited for at
    the end of backward."""
    state: Any
    before_forward: bool
    """Whether the hook is called before forward, or after it."""


class Buffers:
    """The synchronisation of one model's buffers.

    Args:
        model: the model that has the buffers.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.sync_next = True
        """Whether the next forward that may be followed by a backward makes buffers equal."""
        self.hook: BufferHook | None = None
        self._packed: BroadcastBuffer | None = None
        self._futures: list[Future] = []

    def due(self, ranks: Ranks, syncs: bool) -> Mapping[str, torch.Tensor]:
        """Returns the buffers that are to be made equal now; none if it is not the time.

        Args:
            ranks: the ranks that have a copy of the model.
            syncs: whether the options ask for equal buffers at forwards.
        """
        if ranks.alone or not (syncs and self.sync_next):
            return {}
        return self._model.buffers()

    def before_forward(self, ranks: Ranks, syncs: bool) -> None:
        """Makes the buffers equal, if it is time and no hook does it after the forward.

        Collective then. The arguments are those of :meth:`due`.
        """
        hook = self.hook
        if hook is not None and not hook.before_forward:
            return
        buffers = self.due(ranks, syncs)
        if hook is not None and buffers:
            self._run(hook, buffers)
        elif buffers:
            self.broadcast(buffers, ranks)

    def after_forward(self, ranks: Ranks, syncs: bool) -> None:
        """Runs a hook that is to be run after a forward, if it is time.

        The arguments are those of :meth:`due`.
        """
        hook = self.hook
        if hook is not None and not hook.before_forward:
            buffers = self.due(ranks, syncs)
            if buffers:
                self._run(hook, buffers)

    def broadcast(self, named: Mapping[str, torch.Tensor], ranks: Ranks, root: int = 0) -> None:
        """Gives every rank the values of rank ``root`` of the group. One collective; waits for it.

        Args:
            named: buffers by name, at least one; of any strides, which may differ between ranks.
            ranks: the ranks that have a copy of the model.
            root: the rank, within the group, that has the values; the same on every rank.

        Raises:
            ValueError: if a buffer cannot be sent; names it.
            RuntimeError: if the script has destroyed the group.
        """
        group = ranks.group
        if group is None:
            raise RuntimeError(
                "fastddp: the process group of this model was destroyed before its forward; call"
                " destroy_process_group() after the last one, or run model.module instead"
            )
        first = next(iter(named))
        call = f"the broadcast of {len(named)} buffers ('{first}' ...) before forward"
        transport = ranks.transport(group, self._model.device)
        with waiting(group, call), labelled(self._model.owner.number):
            buffers = list(named.values())
            if self._packed is None or not self._packed.serves(buffers):
                for name, buffer in named.items():
                    check_layout("buffer", name, buffer)
                self._packed = BroadcastBuffer(buffers)
            self._packed.broadcast(transport, root)

    def _run(self, hook: BufferHook, buffers: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            futures = hook.hook(hook.state, buffers)
        if futures is not None:
            self._futures += [futures] if hasattr(futures, "wait") else futures

    # ---- futures ---------------------------------------------------------------------------------

    @property
    def has_futures(self) -> bool:
        """Whether something is to be waited for at the end of the next round."""
        return bool(self._futures)

    def add_futures(self, futures: Iterable[Future]) -> None:
        """Has futures waited for at the end of the next round."""
        self._futures += futures

    def wait(self, ranks: Ranks) -> None:
        """Waits for all futures, for the group's timeout each; at the end of a round.

        Raises:
            RuntimeError: if one is not completed in time.
            Exception: the error that a future holds.
        """
        futures, self._futures = self._futures, []
        for future in futures:
            if isinstance(future, torch._C.Future):  # a work has a deadline of its own
                what = f"rank {ranks.rank}: a future that the buffer hook returned"
                await_future(future, ranks.timeout_s(self._model.device), what)
            future.wait()
