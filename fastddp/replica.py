"""One rank's copy of a model in a group of copies: what keeps it equal to the others."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp import config, memory, optim_in_backward, shm
from fastddp import engine as engines
from fastddp.agreement import agree_on_module, check_module, ignored_names
from fastddp.buffers import BufferHook, Buffers
from fastddp.collectives import broadcast_tensors
from fastddp.compiler import refuse_compiled_autograd, untraced
from fastddp.delayed import DelayedReducer
from fastddp.engine.python import RoundStats
from fastddp.hooks import BucketRunner, CommHook, HookRunner
from fastddp.mixed_precision import LowPrecision, cast_buffers
from fastddp.options import Options
from fastddp.outputs import tensors_in
from fastddp.plan import BucketPlan
from fastddp.reduce_dtype import ReduceInDtype

_log = logging.getLogger("fastddp")
_MAX_NAMES = 50


class Replica:
    """Starts equal to rank 0's, and stays equal: gradients by a reducer, buffers by broadcast.

    Args:
        module: the model itself.
        group: the ranks that have a copy, or None for a world of one process.
        options: see there.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None, options: Options) -> None:
        self.options = options
        self.module = module
        self.buffers = Buffers(module)
        mixed = options.mixed_precision
        param_dtype = None if mixed is None else mixed.param_dtype
        self.low_precision = None if param_dtype is None else LowPrecision(module, param_dtype)
        self.sync_buffers_next = True
        self.num_accumulated = 0  # micro-batches since the latest step, see fastddp.accumulate
        self._set_group(group)
        self._sync = True
        self._divisor: float | None = None
        self.hook: CommHook | None = None
        self._reducer: engines.Reducer | None = None
        self._delayed: DelayedReducer | None = None
        self._hooked: dict[nn.Parameter, tuple[torch.dtype, torch.device]] = {}
        self._stepping: list[nn.Parameter] = []  # have optimizers that step in backward
        self._unused_logged = False
        self._began = False
        self._decides_at_forward = False
        self._detached = False
        self.buffer_hook: BufferHook | None = None
        self._buffer_futures: list[torch.futures.Future[Any]] = []

    def _set_group(self, group: ProcessGroup | None) -> None:
        # Weak: whoever frees a process group last joins its threads, and must not hold the GIL.
        self._group = weakref.ref(group) if group is not None else None
        self._alone = group is None or group.size() == 1

    # ---- once ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Checks the module and, unless `init_sync` is off, gives every rank rank 0's values.

        Collective then: first the ranks' modules are compared.

        Raises:
            ValueError, RuntimeError: if the module is unfit.
            MismatchError: on every rank, if the modules differ or another rank's is unfit.
        """
        if self._alone or not self.options.init_sync:
            self._check()
        else:
            agree_on_module(self.live_group, self.module, self.options.to_agree_on(), self._check)
            self.broadcast_model(with_buffers=self.options.init_sync_buffers)
        mixed = self.options.mixed_precision
        if mixed is not None and mixed.buffer_dtype is not None:
            cast_buffers(self.module, mixed.buffer_dtype)

    def _check(self) -> None:
        check_module(self.module)
        engines.choose(self.options.engine)
        config.keep_memory()
        config.shm()

    def broadcast_model(self, root: int = 0, with_buffers: bool = True) -> None:
        """Gives every rank the parameters, and buffers, of rank ``root`` of the group."""
        if self._alone:
            return
        ignored = self.ignored
        tensors: list[torch.Tensor] = [
            param for name, param in self.module.named_parameters() if name not in ignored
        ]
        if with_buffers:
            tensors += self.buffers.named().values()
        broadcast_tensors(self.live_group, tensors, root)

    def attach(self) -> None:
        """Hooks the parameters, from now on averaged."""
        if self._alone and self.hook is None:
            return
        group = self.group
        if group is None:
            return
        if not self._alone and self.device.type == "cpu":
            memory.keep()
        elsewhere, sparse = self.ignored | self.delayed, _sparse_parameters(self.module)
        named = {name: p for name, p in self.module.named_parameters() if name not in elsewhere}
        # Once hooked, for ever: else two halves of a model that train in turns would have it hooked
        # anew at each turn.
        hooked = {name: p for name, p in named.items() if p.requires_grad or p in self._hooked}
        frozen = [p for name, p in named.items() if name not in hooked]
        names = sorted(hooked, key=lambda name: hooked[name] in sparse)  # stable: sparse ones last
        params = [hooked[name] for name in names]
        self._reducer = engines.make_reducer(
            engines.choose(self.options.engine),
            params,
            names,
            sum(p in sparse for p in params),
            frozen,
            self._transport(group),
            self.options.caps_bytes,
            self.options.comm_dtype,
        )
        self._hooked = {param: (param.dtype, param.device) for param in params}
        if self.options.delay is not None:
            self._delayed = DelayedReducer(self.options.delay, self.module, group)
        self.sync = self._sync
        if self._divisor is not None:
            self.divisor = self._divisor
        runner = self._runner()
        if runner is not None:
            self._reducer.set_hook(runner)
        self._stepping = optim_in_backward.take_over(params)
        self._watch_rounds()

    def refresh(self) -> None:
        """Hooks the parameters anew if a conversion gave them another dtype or device.

        Autograd gives a converted parameter a new gradient node, which no hook is on.
        """
        if any((p.dtype, p.device) != before for p, before in self._hooked.items()):
            self.reattach()

    def reattach(self) -> None:
        """Hooks the parameters anew; on every rank before the same backward."""
        if not self._detached:
            self._unhook()
            self.attach()

    def detach(self) -> None:
        """Unhooks the parameters, for good: their gradients are this rank's own from now on."""
        self._unhook()
        self._detached = True

    def _unhook(self) -> None:
        if self._reducer is not None:
            self._reducer.close()
        if self._delayed is not None:
            self._delayed.close()

    def move_to(self, group: ProcessGroup) -> None:
        """Averages over the ranks of another group from now on."""
        self._set_group(group)
        self._unhook()
        self._reducer = None
        self.attach()

    # ---- every step ------------------------------------------------------------------------------

    @property
    def sync(self) -> bool:
        """Whether a backward that begins now averages gradients."""
        return self._sync

    @sync.setter
    @untraced
    def sync(self, value: bool) -> None:
        self._sync = value
        if not self._decides_at_forward:
            self._tell_sync()

    def _tell_sync(self) -> None:
        if self._reducer is not None:
            self._reducer.sync = self._sync
        if self._delayed is not None:
            self._delayed.sync = self._sync

    @property
    def decides_at_forward(self) -> bool:
        """Whether a backward averages that is in sync when this is set, not when it begins.

        For `join`, where ranks that have run out of inputs are told at the forward.
        """
        return self._decides_at_forward

    @decides_at_forward.setter
    def decides_at_forward(self, value: bool) -> None:
        self._decides_at_forward = value
        self._tell_sync()

    @untraced
    def before_forward(self) -> None:
        """Gives every rank rank 0's buffers, unless the forward before was not synchronised."""
        self.begin()
        if self._decides_at_forward:  # a join that ended early
            self.decides_at_forward = False
        hook = self.buffer_hook
        if hook is not None and not hook.before_forward:
            return
        buffers = self.buffers_due()
        if hook is not None and buffers:
            self._run_buffer_hook(hook, buffers)
        elif buffers:
            self.broadcast_buffers(buffers)

    def begin(self) -> None:
        """Makes ready for a forward, or for that of other ranks.

        Takes over, at the first one, optimizers that parameters got after wrapping.
        """
        self._settle()
        if self._began:
            return
        self._began = True
        if self._reducer is not None:
            self._stepping = optim_in_backward.take_over(self._hooked)
            self._watch_rounds()

    def _settle(self) -> None:
        """Lets a round that its backward has left by an exception be over, as on other ranks."""
        waits = [r.settle() for r in (self._reducer, self._delayed) if r is not None]
        if not all(waits):
            warnings.warn(
                f"fastddp: rank {self.live_group.rank()}: a backward of this model has been running"
                " in another thread for 10 s while its next forward waits; if it raised, this"
                " rank's collectives are out of order from now on",
                RuntimeWarning,
                stacklevel=2,
            )

    @untraced
    def after_forward(self, output: object) -> None:
        """Takes note of where backward will come from, and whether it may be synchronised."""
        hook = self.buffer_hook
        if hook is not None and not hook.before_forward:
            buffers = self.buffers_due()
            if buffers:
                self._run_buffer_hook(hook, buffers)
        self.sync_buffers_next = torch.is_grad_enabled() and self._sync
        if self._reducer is None or not torch.is_grad_enabled():
            return
        refuse_compiled_autograd()
        if self._reducer.outgrown():
            self.reattach()
        outputs = list(tensors_in(output))
        self._reducer.watch(outputs)
        if self._delayed is not None:
            self._delayed.watch(outputs)  # second: its collectives follow the reducer's

    def _end_round(self) -> None:
        """Does what has to follow the averaging."""
        assert self._reducer is not None
        if not self._unused_logged:
            self._unused_logged = True
            _log_unused(self._reducer.unused(), self.live_group.rank())
        futures, self._buffer_futures = self._buffer_futures, []
        for future in futures:
            future.wait()
        optim_in_backward.step(self._stepping)
        if not self._stepping:
            self._reducer.set_after_round(None)

    def _watch_rounds(self) -> None:
        """Has the end of the next round seen here; without need it costs nothing."""
        this = weakref.ref(self)

        @untraced
        def end_round() -> None:
            alive = this()
            if alive is not None:
                alive._end_round()

        if self._reducer is not None:
            self._reducer.set_after_round(end_round)

    # ---- buffers ---------------------------------------------------------------------------------

    def buffers_due(self) -> Mapping[str, torch.Tensor]:
        """Returns the buffers that are to be made equal now; none if it is not the time."""
        if self._alone or not (self.options.forward_sync_buffers and self.sync_buffers_next):
            return {}
        return self.buffers.named()

    def broadcast_buffers(self, buffers: Mapping[str, torch.Tensor], root: int = 0) -> None:
        """Gives every rank the buffers of rank ``root`` of the group."""
        group = self.group
        if group is None:
            raise RuntimeError(
                "fastddp: the process group of this model was destroyed before its forward; call"
                " destroy_process_group() after the last one, or run model.module instead"
            )
        try:
            self.buffers.broadcast(buffers, self._transport(group), root)
        except RuntimeError as error:
            raise torch.distributed.DistBackendError(
                f"fastddp: rank {group.rank()}: the broadcast of {len(buffers)} buffers"
                f" ('{next(iter(buffers))}' ...) before forward failed: {error}"
            ) from error

    def _run_buffer_hook(self, hook: BufferHook, buffers: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            futures = hook.hook(hook.state, buffers)
        if futures is not None:
            self._buffer_futures += [futures] if hasattr(futures, "wait") else futures
            self._watch_rounds()

    # ---- seldom ----------------------------------------------------------------------------------

    def set_hook(self, hook: CommHook) -> None:
        """Hands gradients to a communication hook in place of the all-reduce.

        Raises:
            RuntimeError: if there is no process group that it could communicate in.
        """
        if self.group is None:
            raise RuntimeError(
                "fastddp: a communication hook needs a process group, but this process is alone;"
                " start it with torchrun, or call init_process_group() before wrapping the model"
            )
        self.hook = hook
        if self._reducer is None:
            self.attach()  # a world of one: its hook may be one that steps an optimizer
        else:
            self._reducer.set_hook(self._hook_runner(hook))

    def _runner(self) -> BucketRunner | None:
        """Returns what communicates buckets in place of the all-reduce; None for nothing."""
        if self.hook is not None:
            return self._hook_runner(self.hook)
        dtype = self.options.reduce_dtype
        return None if dtype is None else ReduceInDtype(dtype, self.live_group)

    def _hook_runner(self, hook: CommHook) -> HookRunner:
        options = getattr(self.live_group._get_backend(self.device), "options", None)
        timeout: timedelta = getattr(options, "_timeout", timedelta(minutes=30))
        return HookRunner(hook, timeout.total_seconds())

    @property
    def divisor(self) -> float | None:
        """What gradients are divided by; None for the number of ranks."""
        return self._divisor

    @divisor.setter
    def divisor(self, value: float | None) -> None:
        self._divisor = value
        if self._reducer is not None:
            divisor = float(self.live_group.size()) if value is None else value
            self._reducer.set_divisor(divisor)
            if self._delayed is not None:
                self._delayed.divisor = divisor

    def shadow(self) -> None:
        """Takes part in a round of the other ranks with nothing to add."""
        if self._reducer is not None and self._hooked:  # not if all of them are delayed
            self._reducer.shadow()
        if self._delayed is not None:
            self._delayed.shadow()

    # ---- facts -----------------------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Whether the world is one process, and nothing is synchronised."""
        return self._alone

    @property
    def group(self) -> ProcessGroup | None:
        """The group; None for a world of one, and after the group was destroyed."""
        return self._group() if self._group is not None else None

    @property
    def live_group(self) -> ProcessGroup:
        """The group, where there must be one."""
        group = self.group
        assert group is not None
        return group

    def _transport(self, group: ProcessGroup) -> ProcessGroup:
        """Returns what gradients and buffers go through.

        Without ``init_sync`` the group as it is: to make a counterpart all ranks have to meet, and
        they need not wrap at the same time then.
        """
        return shm.counterpart(group, self.device) if self.options.init_sync else group

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    @property
    def ignored(self) -> frozenset[str]:
        """The parameters and buffers that the module asks data parallelism to leave alone."""
        return ignored_names(self.module)

    @property
    def delayed(self) -> frozenset[str]:
        """The parameters whose gradients are averaged apart from the others."""
        return frozenset(() if self.options.delay is None else self.options.delay.names)

    def stats(self) -> engines.Stats:
        return self._reducer.stats() if self._reducer is not None else RoundStats()

    def plan(self) -> BucketPlan:
        return self._reducer.plan() if self._reducer is not None else BucketPlan(())


def _sparse_parameters(module: nn.Module) -> set[torch.Tensor]:
    """Returns the parameters whose gradients will be sparse."""
    return {
        child.weight
        for child in module.modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse
    }


def _log_unused(names: Iterable[str], rank: int) -> None:
    listed = list(names)
    if listed and rank == 0:
        _log.warning(
            "no rank has used %d parameters in the first backward; their gradients are left alone:"
            " %s%s",
            len(listed),
            ", ".join(listed[:_MAX_NAMES]),
            "" if len(listed) <= _MAX_NAMES else f" and {len(listed) - _MAX_NAMES} more",
        )
