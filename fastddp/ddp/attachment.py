"""The reducers that hang on a model's parameters, and what the script has decided for them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp.comm.groups import name_of, timeout_of, watch
from fastddp.comm.labels import introduce
from fastddp.ddp.model import Model
from fastddp.ddp.options import Options
from fastddp.engine import optim_in_backward
from fastddp.engine.choose import choose, make_reducer
from fastddp.engine.delayed import DelayedReducer
from fastddp.engine.hooks import BucketRunner, CommHook, HookRunner
from fastddp.engine.interface import Settings
from fastddp.engine.reduce_dtype import ReduceInDtype
from fastddp.engine.weak_group import WeakGroup


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """What holds for the rounds that begin from now on, whichever reducer runs them."""

    sync: bool = True
    """Whether a backward averages gradients."""
    manual: bool = False
    """Whether a round ends with the script's call, not with its backward."""
    divisor: float | None = None
    """The number that gradients are divided by; None for the number of ranks."""
    hook: CommHook | None = None
    """Communicates gradients in place of the all-reduce; None for nothing."""


class Phase(Enum):
    """Where the reducers are in their life."""

    HOOKED = "averages the model's gradients"
    RETIRED = "leaves the parameters alone, for the model has changed"
    CLOSED = "hangs on no parameter any more"


_LEGAL = {
    (Phase.HOOKED, Phase.RETIRED),
    (Phase.HOOKED, Phase.CLOSED),
    (Phase.RETIRED, Phase.CLOSED),
}


class Attachment:
    """Hooks a model's parameters. When the model, or the ranks, become others, another one does.

    Args:
        model: the model to hook.
        group: the ranks that have a copy of it; not kept alive.
        transport: the group of the same ranks that gradients go through; not kept alive.
        options: the arguments with which the model was wrapped.
        policy: what the script has decided by now.
    """

    def __init__(
        self,
        model: Model,
        group: ProcessGroup,
        transport: ProcessGroup,
        options: Options,
        policy: RoundPolicy,
    ) -> None:
        self.phase = Phase.HOOKED
        self.transport = weakref.ref(transport)
        self.is_shadowing = False
        """Whether this rank takes part in a round of the others with nothing to add."""
        self._model = model
        self._group = WeakGroup(group)
        self._num_ranks = group.size()
        self._policy = policy
        subject = model.select()
        self._params = subject.params
        settings = Settings(options.caps_bytes, options.comm_dtype, options.lazy_buckets)
        self.reducer = make_reducer(choose(options.engine), subject, transport, settings)
        watch(group)
        introduce(model.owner, name_of(group), subject.names, self.reducer)
        self._delayed: DelayedReducer | None = None
        if options.delay is not None:
            self._delayed = DelayedReducer(options.delay, model.module, group)
        self._set_sync(policy.sync)
        self._set_manual(policy.manual)
        if policy.divisor is not None:
            self._set_divisor(policy.divisor)
        runner = self._runner(policy.hook, options.reduce_dtype)
        if runner is not None:
            self.reducer.set_hook(runner)
        self.stepping: list[nn.Parameter] = []
        """The parameters that have an optimizer that steps in backward."""
        self.take_over_optimizers()

    # ---- what the script decides -----------------------------------------------------------------

    def follow(self, policy: RoundPolicy) -> None:
        """Goes by another policy from the next round on.

        Raises:
            RuntimeError: for a hook, if the script has destroyed the group.
        """
        before, self._policy = self._policy, policy
        if policy.sync != before.sync:
            self._set_sync(policy.sync)
        if policy.manual != before.manual:
            self._set_manual(policy.manual)
        if policy.divisor != before.divisor:
            self._set_divisor(policy.divisor)
        if policy.hook is not before.hook and policy.hook is not None:
            self.reducer.set_hook(self._hook_runner(policy.hook))

    def _set_sync(self, sync: bool) -> None:
        self.reducer.sync = sync
        if self._delayed is not None:
            self._delayed.sync = sync

    def _set_manual(self, manual: bool) -> None:
        self.reducer.manual = manual
        if self._delayed is not None:
            self._delayed.manual = manual

    def _set_divisor(self, divisor: float | None) -> None:
        value = float(self._num_ranks) if divisor is None else divisor
        self.reducer.set_divisor(value)
        if self._delayed is not None:
            self._delayed.divisor = value

    def _runner(self, hook: CommHook | None, dtype: torch.dtype | None) -> BucketRunner | None:
        """Returns what communicates buckets in place of the all-reduce; None for nothing."""
        if hook is not None:
            return self._hook_runner(hook)
        return None if dtype is None else ReduceInDtype(dtype, self._group())

    def _hook_runner(self, hook: CommHook) -> HookRunner:
        timeout = timeout_of(self._group(), self._model.device)
        return HookRunner(hook, timeout.total_seconds())

    def take_over_optimizers(self) -> None:
        """Takes over the optimizers that step in backward and that parameters have by now."""
        self.stepping = optim_in_backward.take_over(self._params)

    # ---- life ------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Leaves the parameters alone, and tells the other ranks with the next round.

        Raises:
            RuntimeError: if it does that already, or is closed.
        """
        self._move(Phase.RETIRED)
        self.reducer.retire()

    def close(self) -> None:
        """Unhooks the parameters; does nothing if that was done before."""
        if self.phase is Phase.CLOSED:
            return
        self._move(Phase.CLOSED)
        self.reducer.close()
        if self._delayed is not None:
            self._delayed.close()

    def _move(self, to: Phase) -> None:
        if (self.phase, to) not in _LEGAL:
            raise RuntimeError(
                f"fastddp: a reducer that {self.phase.value} ({self.phase.name}) cannot become"
                f" {to.name}"
            )
        self.phase = to

    # ---- rounds ----------------------------------------------------------------------------------

    def is_in_flight(self) -> bool:
        """Returns whether gradients of a backward that is over wait to be finalized."""
        delayed = self._delayed
        return self.reducer.is_in_flight() or (delayed is not None and delayed.is_in_flight())

    def settle(self) -> bool:
        """Lets a round that its backward has left by an exception be over, as on other ranks.

        Returns:
            Whether it is over. False after ten seconds, in which another thread has not ended it.
        """
        is_over = self.reducer.settle()
        return (self._delayed is None or self._delayed.settle()) and is_over

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        """Takes note of what a forward has returned, after each forward in grad mode."""
        self.reducer.watch(outputs)
        if self._delayed is not None:
            self._delayed.watch(outputs)  # second: its collectives follow the reducer's

    def finalize(self) -> None:
        """Ends a manual round, but for delayed gradients: :meth:`finalize_delayed` comes first.

        Raises:
            RuntimeError: if there is no such round, or not yet one that may be ended.
        """
        if self._params or self._delayed is None:  # else all of them are delayed
            self.reducer.finalize()

    def finalize_delayed(self) -> None:
        """Ends what a manual round does for delayed gradients; nothing if none are in flight."""
        if self._delayed is not None:
            self._delayed.finalize()

    def shadow(self) -> None:
        """Takes part in a round of the other ranks with nothing to add.

        :meth:`shadow_delayed` follows, of the attachment that there is by then: the round may bring
        the news that the model of a rank has changed.
        """
        if not self._params:  # all of them are delayed
            return
        self.is_shadowing = True
        try:
            self.reducer.shadow()
        finally:
            self.is_shadowing = False

    def shadow_delayed(self) -> None:
        """Takes part in an averaging of the other ranks' delayed gradients."""
        if self._delayed is not None:
            self._delayed.shadow()
