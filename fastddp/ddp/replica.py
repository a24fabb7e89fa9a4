"""One rank's copy of a model in a group of copies: what keeps it equal to the others."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp import config
from fastddp.comm import shm
from fastddp.comm.collectives import broadcast_tensors, timeout_of
from fastddp.comm.labels import introduce, labelled, number_models, owner_of_copy
from fastddp.comm.waiting import waiting
from fastddp.ddp.agreement import agree_on_module, check_module, ignored_names, sparse_parameters
from fastddp.ddp.arrivals import Arrivals
from fastddp.ddp.buffers import BufferHook, Buffers
from fastddp.ddp.changes import ModelWatch, describe
from fastddp.ddp.mixed_precision import LowPrecision, cast_buffers
from fastddp.ddp.options import Options
from fastddp.device import memory
from fastddp.device.backward import at_end_of_backward, in_backward
from fastddp.device.compiler import refuse_compiled_autograd, untraced
from fastddp.device.nested import tensors_in
from fastddp.device.streams import has_streams
from fastddp.engine import optim_in_backward
from fastddp.engine.choose import choose, make_reducer
from fastddp.engine.delayed import DelayedReducer
from fastddp.engine.hooks import BucketRunner, CommHook, HookRunner, await_future
from fastddp.engine.interface import Reducer, Stats
from fastddp.engine.news import News
from fastddp.engine.plan import BucketPlan
from fastddp.engine.python.reducer import RoundStats
from fastddp.engine.reduce_dtype import ReduceInDtype
from fastddp.errors import MismatchError

_log = logging.getLogger("fastddp")
_MAX_NAMES = 50

_on_group: weakref.WeakKeyDictionary[ProcessGroup, weakref.WeakSet[Replica]] = (
    weakref.WeakKeyDictionary()
)


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
        """Whether the next forward that may be followed by a backward broadcasts buffers."""
        self._may_meet = True
        self._attached_to: weakref.ref[ProcessGroup] | None = None
        self.authoritative_rank: int | None = None  # whose model a join has given to all
        self.arrivals: Arrivals | None = None  # of gradients, if somebody asks for their times
        self.is_lent = False  # whether `.grad` is a distributed backward's, until that is over
        self.num_accumulated = 0  # micro-batches since the latest step, see fastddp.accumulate
        self._set_group(group)
        self._owner = owner_of_copy(module)
        self._watch = ModelWatch(module)
        self._change = ""  # of the model since it was hooked, in words
        self._num_agreements = 0
        self._is_shadowing = False
        self._empty_logged = False
        self._sync = True
        self._manual = False
        self._error = ""  # of a former reducer
        self._divisor: float | None = None
        self.hook: CommHook | None = None
        self._reducer: Reducer | None = None
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
        if group is not None:
            _on_group.setdefault(group, weakref.WeakSet()).add(self)
        self._rank = 0 if group is None else group.rank()

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
        if not self._alone:
            self._owner = number_models(self.live_group, self.module, self.options.init_sync)
        mixed = self.options.mixed_precision
        if mixed is not None and mixed.buffer_dtype is not None:
            cast_buffers(self.module, mixed.buffer_dtype)

    def _check(self) -> None:
        options = self.options
        sends_buffers = not self._alone and (
            options.forward_sync_buffers or (options.init_sync and options.init_sync_buffers)
        )
        check_module(self.module, sends_buffers=sends_buffers)
        choose(self.options.engine)
        config.keep_memory()
        config.shm()

    def start_as_copy(self) -> None:
        """Begins as the copy of a replica that one rank may make alone, or load.

        Where the ranks have yet to meet to share memory, they do so at the first forward that may
        be followed by a backward.
        """
        self._may_meet = False
        self.attach()

    def broadcast_model(
        self, root: int = 0, with_buffers: bool = True, call: str = "wrapping a model"
    ) -> None:
        """Gives every rank the parameters, and buffers, of rank ``root`` of the group. Collective.

        Args:
            root: whose.
            with_buffers: else the parameters alone.
            call: what the script has called, for messages.
        """
        if self._alone:
            return
        ignored = self.ignored
        tensors: list[torch.Tensor] = [
            param for name, param in self.module.named_parameters() if name not in ignored
        ]
        if with_buffers:
            tensors += self.buffers.named().values()
        what = f"{call}: the broadcast of {len(tensors)} parameters and buffers"
        broadcast_tensors(self.live_group, tensors, root, what)

    def attach(self) -> None:
        """Hooks the parameters, from now on averaged."""
        if self._alone and self.hook is None:
            return
        group = self.group
        if group is None:
            return
        if not self._alone and self.device.type == "cpu":
            memory.keep()
        transport = self._transport(group)
        self._attached_to = weakref.ref(transport)
        elsewhere, sparse = self.ignored | self.delayed, sparse_parameters(self.module)
        named = {name: p for name, p in self.module.named_parameters() if name not in elsewhere}
        # Once hooked, for ever: else two halves of a model that train in turns would have it hooked
        # anew at each turn.
        hooked = {name: p for name, p in named.items() if p.requires_grad or p in self._hooked}
        frozen = [p for name, p in named.items() if name not in hooked]
        names = sorted(hooked, key=lambda name: hooked[name] in sparse)  # stable: sparse ones last
        params = [hooked[name] for name in names]
        self._reducer = make_reducer(
            choose(self.options.engine),
            params,
            names,
            sum(p in sparse for p in params),
            frozen,
            transport,
            self.options.caps_bytes,
            self.options.comm_dtype,
            self._owner.number,
            self._owner.title,
            self.options.lazy_buckets,
        )
        introduce(self._owner)
        if not self._change:
            self._watch.look()
        self._reducer.set_on_news(self._news())
        self._hooked = {param: (param.dtype, param.device) for param in params}
        if self.options.delay is not None:
            self._delayed = DelayedReducer(self.options.delay, self.module, group)
        self.sync = self._sync
        self.manual = self._manual
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
        """Hooks the parameters anew; on every rank before the same backward.

        A change of the model that the ranks have not agreed on is still to be announced.
        """
        if self._detached:
            return
        self.refuse_in_flight("hooking the parameters anew")
        owes = self._owes_agreement()
        if not self._change and self._watch.is_doubtful:
            self._change = self._watch.difference()
        self._unhook()
        self._error = self.error
        self._reducer = None
        self.attach()
        if self._change and self._reducer is not None:
            self._reducer.retire()
        if owes and self._reducer is not None:
            self._reducer.leave_news()

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
        """Averages over the ranks of another group from now on. Collective in that.

        Raises:
            RuntimeError: if gradients are in flight.
        """
        self.refuse_in_flight("a change of process groups")
        self._set_group(group)
        self.reattach()

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
    def manual(self) -> bool:
        """Whether a round that begins now ends with :meth:`finalize`, not with its backward."""
        return self._manual

    @manual.setter
    @untraced
    def manual(self, value: bool) -> None:
        self._manual = value
        if self._reducer is not None:
            self._reducer.manual = value
        if self._delayed is not None:
            self._delayed.manual = value

    @property
    def is_in_flight(self) -> bool:
        """Whether the gradients of a backward that is over wait for :meth:`finalize`."""
        parts = [part for part in (self._reducer, self._delayed) if part is not None]
        return any(part.is_in_flight() for part in parts)

    @property
    def ends_after_backward(self) -> bool:
        """Whether the next round has to wait for the end of its backward to be finalized.

        Then something follows that all ranks have to do at the same time, in no other model's
        midst: to agree on a change of the model, or to average delayed gradients.
        """
        return bool(self._change) or self._delayed is not None

    def finalize(self) -> None:
        """Ends a manual round: waits for what is in flight and has it in ``.grad``.

        Does nothing where nothing is synchronised.

        Raises:
            RuntimeError: if there is none, or not yet one that may be ended.
        """
        if self._reducer is None or (self._detached and not self.is_in_flight):
            return
        if in_backward() and self.ends_after_backward:
            why = self._change or "gradients are delayed (delay_all_reduce_named_params)"
            raise RuntimeError(
                f"fastddp: rank {self._rank}: finalize_backward() has to wait for the end of this"
                f" backward: {why}. Where should_finalize_after_backward is True after forward,"
                " call it after backward"
            )
        if self._delayed is None:
            self._reducer.finalize()
            return
        if self._hooked:  # else all of them are delayed
            self._reducer.finalize()
        self._delayed.finalize()

    def refuse_in_flight(self, call: str) -> None:
        """Refuses what would lose gradients that are in flight, or add to them.

        Args:
            call: what, for the message.

        Raises:
            RuntimeError: if there are any.
        """
        if self.is_in_flight:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: {call} while the gradients of the latest backward are"
                " in flight; call finalize_backward() first"
            )

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
        """Gives every rank rank 0's buffers, unless the forward before was not synchronised.

        Collective then, but not without grad mode: one rank may evaluate alone.
        """
        self.begin()
        if self._decides_at_forward:  # a join that ended early
            self.decides_at_forward = False
        if not torch.is_grad_enabled():
            return
        if self._sync:
            self.refuse_in_flight("a forward that may be followed by a synchronised backward")
        self.settle_news()
        self.notice_change()
        self.meet()
        hook = self.buffer_hook
        if hook is not None and not hook.before_forward:
            return
        buffers = self.buffers_due()
        if hook is not None and buffers:
            self._run_buffer_hook(hook, buffers)
        elif buffers:
            self.broadcast_buffers(buffers)

    def meet(self) -> None:
        """Has a copy share memory with the other ranks, see :meth:`start_as_copy`. Collective."""
        if self._may_meet:
            return
        self._may_meet = True
        group = self.group
        if group is None or self._attached_to is None:
            return
        if self._transport(group) is not self._attached_to():
            self.reattach()

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
        if not torch.is_grad_enabled():
            return
        hook = self.buffer_hook
        if hook is not None and not hook.before_forward:
            buffers = self.buffers_due()
            if buffers:
                self._run_buffer_hook(hook, buffers)
        self.sync_buffers_next = self._sync
        if self._reducer is None:
            return
        refuse_compiled_autograd()
        self.notice_change(after_forward=True)
        outputs = list(tensors_in(output))
        self._reducer.watch(outputs)
        if self._delayed is not None:
            self._delayed.watch(outputs)  # second: its collectives follow the reducer's

    # ---- a model that changes --------------------------------------------------------------------

    def notice_change(self, *, after_forward: bool = False) -> None:
        """Leaves parameters alone that are no longer those that were hooked.

        The next round tells the other ranks; at its end all compare their models and average the
        gradients of that round, then those of the parameters that there are now.
        """
        reducer = self._reducer
        if reducer is None or self._change or self._detached or in_backward():
            return
        if self.is_in_flight:  # a retired reducer would drop the gradients; later is soon enough
            return
        if (
            (self._watch.is_doubtful and self._watch.difference())
            or reducer.outgrown()
            or (not after_forward and reducer.is_stale())
        ):
            self._change = self._describe_change()
            reducer.retire()

    def _describe_change(self) -> str:
        """Returns what is another than when the parameters were hooked, in words.

        The same on ranks that made the same changes, whenever each was noticed.
        """
        assert self._reducer is not None
        what = [self._watch.difference()]
        if self._reducer.outgrown():
            trained = ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)
            what.append(describe({"trained now": [n for n, p in trained if p not in self._hooked]}))
        if self._reducer.is_stale():
            what.append("a parameter has another shape, layout, dtype, device or storage")
        return "; ".join(text for text in what if text) or "something that has been undone since"

    def _news(self) -> Callable[[News], None]:
        this = weakref.ref(self)

        @untraced
        def on_news(news: News) -> None:
            alive = this()
            if alive is None:
                return
            if news is News.EMPTY:
                alive._log_empty()
            elif news is News.CHANGED_BEFORE:
                alive._agree_on_change(has_changed=False)  # raises
            elif in_backward():
                # Once all models of this backward are done: ranks launch the buckets of those that
                # come after this one at times of their own.
                at_end_of_backward(alive._end_of_backward_with_news)
            else:
                alive._agree_on_change()

        return on_news

    def _end_of_backward_with_news(self, ok: bool) -> None:
        if ok:
            self._agree_on_change()
        elif self._reducer is not None:  # it has raised here, perhaps alone: other ranks wait
            self._reducer.leave_news()

    def settle_news(self) -> None:
        """Agrees with the other ranks on changes for which they wait since a backward.

        Which has raised on this rank, maybe before it could know. Of all models on the group, in
        the order in which the others do. Collective then.
        """
        group = self.group
        if group is None:
            return
        owing = [
            (replica._reducer.began_ns, replica)
            for replica in list(_on_group.get(group, ()))
            if replica._owes_agreement() and replica._reducer is not None
        ]
        for _, replica in sorted(owing, key=lambda one: one[0]):
            assert replica._reducer is not None
            replica._reducer.read_left_news()
            replica._agree_on_change(adds=False)

    def _owes_agreement(self) -> bool:
        group, reducer = self.group, self._reducer
        if group is None or reducer is None or not reducer.has_left_news:
            return False
        with waiting(group, "the rest of a backward that has raised"):
            owes = reducer.read_left_news()
        if owes:
            reducer.leave_news()
        return owes

    def _agree_on_change(self, *, has_changed: bool | None = None, adds: bool = True) -> None:
        """Finds out whether all ranks made the same change, and averages what there is now.

        Called on every rank, at the end of the round in which one has said that its model changed.

        Args:
            has_changed: whether this rank's model had changed in that round, by default as it has
                by now.
            adds: whether what is in ``.grad`` belongs to that round. Else it stays as it is, and
                the average is the other ranks' alone.

        Raises:
            MismatchError: on every rank, if they did not.
        """
        has_changed = bool(self._change) if has_changed is None else has_changed
        # As of now: a rank may have noticed one change of several, in a forward of its own.
        change = self._describe_change() if has_changed else "none"
        settings = {**self.options.to_agree_on(), "the change since it was wrapped": change}
        self._num_agreements += 1
        # On a device a rank that has not changed comes late, after other collectives.
        topic = f"{self._owner.number}/{self._num_agreements}" if has_streams(self.device) else None
        try:
            agree_on_module(self.live_group, self.module, settings, self._check, topic)
        except MismatchError as error:
            raise MismatchError(
                f"{error} (Found out after a backward, since rank {self.live_group.rank()}'s model"
                f" has changed: {change if has_changed else 'it has not, but another one has'}.)"
            ) from None
        if self.options.init_sync:
            self.broadcast_model(with_buffers=self.options.init_sync_buffers)
        self._change = ""
        self._watch.look()
        self.reattach()
        assert self._reducer is not None
        if adds and not self._is_shadowing:
            self._reducer.average()
            return
        kept = {param: param.grad for param in self.module.parameters()}
        for param in kept:  # what is there is the others', or of another time
            param.grad = None
        self._reducer.average()
        if not adds:
            for param, grad in kept.items():
                param.grad = grad

    def _log_empty(self) -> None:
        if not self._empty_logged and self.live_group.rank() == 0:
            self._empty_logged = True
            _log.warning(
                "no rank had a gradient for any parameter of %s in a backward through its output;"
                " are its parameters those that the loss depends on?",
                self._owner.title,
            )

    # ---- every step, continued -------------------------------------------------------------------

    def _end_round(self) -> None:
        """Does what has to follow the averaging."""
        assert self._reducer is not None
        if not self._unused_logged:
            self._unused_logged = True
            _log_unused(self._reducer.unused(), self.live_group.rank())
        futures, self._buffer_futures = self._buffer_futures, []
        for future in futures:
            if isinstance(future, torch._C.Future):  # a work has a deadline of its own
                rank = self.live_group.rank()
                what = f"rank {rank}: a future that the buffer hook returned"
                await_future(future, self._timeout_s, what)
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
        """Gives every rank the buffers of rank ``root`` of the group. Collective."""
        group = self.group
        if group is None:
            raise RuntimeError(
                "fastddp: the process group of this model was destroyed before its forward; call"
                " destroy_process_group() after the last one, or run model.module instead"
            )
        first = next(iter(buffers))
        call = f"the broadcast of {len(buffers)} buffers ('{first}' ...) before forward"
        transport = self._transport(group)
        with waiting(group, call), labelled(self._owner.number):
            self.buffers.broadcast(buffers, transport, root)

    def _run_buffer_hook(self, hook: BufferHook, buffers: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            futures = hook.hook(hook.state, buffers)
        if futures is not None:
            self._buffer_futures += [futures] if hasattr(futures, "wait") else futures
            self._watch_rounds()

    def wait_after_backward(self, futures: Iterable[torch.futures.Future[Any]]) -> None:
        """Has futures waited for at the end of the next round."""
        self._buffer_futures += futures
        self._watch_rounds()

    # ---- seldom ----------------------------------------------------------------------------------

    def set_hook(self, hook: CommHook) -> None:
        """Hands gradients to a communication hook in place of the all-reduce.

        Raises:
            RuntimeError: if there is no process group that it could communicate in, or gradients
                are in flight.
        """
        self.refuse_in_flight("registering a communication hook")
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
        return HookRunner(hook, self._timeout_s)

    @property
    def _timeout_s(self) -> float:
        return timeout_of(self.live_group, self.device).total_seconds()

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
            self._is_shadowing = True
            try:
                self._reducer.shadow()
            finally:
                self._is_shadowing = False
        if self._delayed is not None:
            self._delayed.shadow()

    # ---- facts -----------------------------------------------------------------------------------

    @property
    def hooked(self) -> Collection[nn.Parameter]:
        """The parameters whose gradients the reducer averages."""
        return self._hooked.keys()

    @property
    def has_begun(self) -> bool:
        """Whether there was a forward, on this rank or on others."""
        return self._began

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
        """Returns what gradients and buffers go through. Collective at the first call for a group.

        Without ``init_sync`` the group as it is: to make a counterpart all ranks have to meet, and
        they need not wrap at the same time then.
        """
        if not self.options.init_sync:
            return group
        device = self.device
        if not shm.has_to_meet(group, device):
            return shm.counterpart(group, device)
        if not self._may_meet:
            return group
        with waiting(group, "wrapping a model: the connection of the ranks' memory"):
            return shm.counterpart(group, device)

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

    def stats(self) -> Stats:
        return self._reducer.stats() if self._reducer is not None else RoundStats()

    @property
    def error(self) -> str:
        """What the latest error in a backward of the model said; empty if there was none."""
        return (self._reducer.error() if self._reducer is not None else "") or self._error

    def used_by(self) -> Sequence[int]:
        """Returns, by hooked parameter, how many ranks had a gradient in the latest round."""
        return self._reducer.used_by() if self._reducer is not None else []

    def plan(self) -> BucketPlan:
        return self._reducer.plan() if self._reducer is not None else BucketPlan(())


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
