"""Parameters whose gradients are averaged apart from the others, when one parameter's is there."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from fastddp.comm.loans import Loan, settle, without_context
from fastddp.comm.patience import WayToWait, way_to_wait
from fastddp.comm.waiting import waiting
from fastddp.device.backward import at_end_of_backward, on_backward, wait_until
from fastddp.device.compiler import untraced
from fastddp.device.streams import has_streams, is_capturing
from fastddp.engine.delay import Delay
from fastddp.engine.weak_group import WeakGroup
from fastddp.watch.slow_wait import What


class _Phase(Enum):
    """Where a delayed reducer is with respect to backward."""

    IDLE = "no backward runs that is synchronised"
    OPEN = "a synchronised backward runs"
    DUE = "a synchronised backward runs, and the trigger has its gradient"


class DelayedReducer:
    """Averages the gradients of delayed parameters at the ends of some backwards.

    These are the backwards that give the trigger a gradient and are not inside `no_sync`, the same
    ones on every rank. What is averaged is ``.grad``, so gradients may come from any number of
    backwards.

    The collectives are launched at the end of backward, after the reducer's: ranks launch the
    latter's at times of their own, and all collectives of a group must be in one order.

    Args:
        delay: the delayed parameters, and the parameter that ends the delay.
        module: the module that has the parameters.
        group: the ranks that average; not kept alive.
    """

    def __init__(self, delay: Delay, module: nn.Module, group: ProcessGroup) -> None:
        params = dict(module.named_parameters())
        self.sync = True
        """Whether a backward that begins now may average."""
        self.manual = False
        """Whether :meth:`finalize` writes what a backward averages, and not the end of it."""
        self.divisor = float(group.size())
        self._delay = delay
        self._group = WeakGroup(group)
        self._rank = group.rank()
        self._params = [params[name] for name in delay.names]
        self._phase = _Phase.IDLE
        self._is_manual = False  # whether what the backward averages is to be finalized
        self._in_flight: list[_Flat] = []
        self._used: dict[torch.dtype, list[float]] = {}  # flags that were read last
        self._abandoned: list[Loan] = []
        this = weakref.ref(self)

        @untraced
        def on_trigger(_: Tensor) -> None:
            alive = this()
            if alive is not None:
                alive._on_trigger()

        self._hook = params[delay.trigger].register_post_accumulate_grad_hook(on_trigger)

    def __del__(self) -> None:
        for flat in self._in_flight:
            flat.works.clear()
        settle([*self._abandoned, *(flat.loan for flat in self._in_flight)])

    def watch(self, outputs: Iterable[Tensor]) -> None:
        """Takes note of the tensors that a forward has returned.

        A backward through it ends when all of it ends, not an inner one that gives the trigger its
        gradient, as those of re-entrant checkpoints may.
        """
        this = weakref.ref(self)

        def begin() -> None:
            alive = this()
            if alive is not None:
                alive._begin()

        on_backward(outputs, begin)

    def settle(self) -> bool:
        """Waits for another thread to end a backward that has raised.

        Returns:
            Whether it is over, see :meth:`fastddp.engine.interface.Reducer.settle`.
        """
        on_device = has_streams(self._params[0].device)
        return not on_device or wait_until(lambda: self._phase is _Phase.IDLE)

    def is_in_flight(self) -> bool:
        """Returns whether gradients wait for :meth:`finalize`."""
        return bool(self._in_flight)

    @torch.no_grad()
    def finalize(self) -> None:
        """Waits for the gradients in flight, if there are any, and writes them to ``.grad``."""
        flats, self._in_flight = self._in_flight, []
        for flat in flats:
            self._wait_for(flat)
            self._hand_out(flat)

    def close(self) -> None:
        """Unhooks the trigger; nothing is averaged any more."""
        self._hook.remove()

    @torch.no_grad()
    def shadow(self) -> None:
        """Takes part in an averaging of the other ranks, with nothing to add or take."""
        for flat in self._flats(is_shadow=True):
            self._wait_for(flat)

    def _begin(self) -> None:
        if self._in_flight:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: a backward while the delayed gradients of the one"
                " before are in flight; call finalize_backward() before the next backward"
            )
        if self._phase is _Phase.IDLE and self.sync:
            self._phase = _Phase.OPEN
            self._is_manual = self.manual
            # Twice: what the reducer may yet ask for during this backward comes first.
            at_end_of_backward(lambda ok: at_end_of_backward(self._end) if ok else self._end(False))

    def _on_trigger(self) -> None:
        self._begin()
        if self._phase is _Phase.OPEN:
            self._phase = _Phase.DUE

    @untraced
    @torch.no_grad()
    def _end(self, ok: bool) -> None:
        try:
            if self._phase is _Phase.DUE:
                self._average(ok)
        finally:
            self._phase = _Phase.IDLE

    def _average(self, ok: bool) -> None:
        if not ok:
            # The other ranks wait for this one. The backward's own exception says more than one of
            # these.
            self._abandoned = [loan for loan in self._abandoned if not loan.is_settled()]
            with contextlib.suppress(Exception):
                self._abandoned += [flat.loan for flat in self._flats()]
            return
        self._in_flight = self._flats()
        if not self._is_manual:
            self.finalize()

    def _flats(self, *, is_shadow: bool = False) -> list[_Flat]:
        """Packs the gradients, one tensor per dtype, and launches their all-reduces."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for param in self._params:
            by_dtype.setdefault(param.dtype.to_real(), []).append(param)
        return [self._pack(params, dtype, is_shadow) for dtype, params in by_dtype.items()]

    def _pack(self, params: Sequence[nn.Parameter], dtype: torch.dtype, is_shadow: bool) -> _Flat:
        numels = [_real(param).numel() for param in params]
        flat = torch.zeros(sum(numels) + len(params), dtype=dtype, device=params[0].device)
        *pieces, flags = flat.split([*numels, len(params)])
        for param, piece, flag in zip(params, pieces, flags, strict=True):
            if param.grad is not None and not is_shadow:
                grad = param.grad.to_dense() if param.grad.is_sparse else param.grad
                torch.div(_real(grad), self.divisor, out=piece.view(_real(grad).shape))
                flag.fill_(1)
        group = self._group()
        loan = Loan(flat)
        wait = waiting(
            group,
            f"the all-reduce of {len(self._params)} delayed gradients ('{self._delay.names[0]}'"
            f" ...), which follows a backward that gives '{self._delay.trigger}' a gradient,",
        )
        with without_context():
            works = [group.allreduce([flat])]
        way = way_to_wait(group, flat.device)
        return _Flat(params, pieces, flags, works, wait, way, loan)

    def _wait_for(self, flat: _Flat) -> None:
        with flat.wait:
            # Popped: a work refers to its tensor, and the loan ends here.
            flat.way_to_wait(flat.works.pop(), What("delayed gradients"))
        settle([flat.loan])

    def _hand_out(self, flat: _Flat) -> None:
        # Reading flags from a device waits for it, which only a rank without a gradient does.
        reads = any(param.grad is None for param in flat.params)
        if reads and not is_capturing(flat.flags.device):  # a graph goes by what was read last
            self._used[flat.flags.dtype] = flat.flags.tolist()
        known = self._used.get(flat.flags.dtype)
        flags = known if reads and known else [1.0] * len(flat.params)
        for param, piece, flag in zip(flat.params, flat.pieces, flags, strict=True):
            if param.grad is None and not flag:
                continue
            if param.grad is None or not _is_plain(param.grad):
                param.grad = torch.empty_like(param)
            real = _real(param.grad)
            real.copy_(piece.view(real.shape))


class _Flat(NamedTuple):
    """The gradients of one dtype on their way."""

    params: Sequence[nn.Parameter]
    pieces: Sequence[Tensor]
    flags: Tensor
    """One element for each parameter: non-zero when any rank had a gradient for it."""
    works: list[Work]
    """One, until it has been waited for."""
    wait: waiting
    way_to_wait: WayToWait
    loan: Loan


def _is_plain(grad: Tensor) -> bool:
    """Returns whether it can be written to: a script's own may share memory among its elements."""
    if grad.layout != torch.strided or grad.is_conj() or grad.is_neg():
        return False
    return bool(torch.ops.aten.is_non_overlapping_and_dense(grad))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
