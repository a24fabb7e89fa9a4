"""One rank's copy of a model in a group of copies: what keeps it equal to the others."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp.ddp import change_agreement
from fastddp.ddp.arrivals import Arrivals
from fastddp.ddp.attachment import Attachment, RoundPolicy
from fastddp.ddp.buffers import Buffers, Future
from fastddp.ddp.change_agreement import ChangeAgreement
from fastddp.ddp.mixed_precision import LowPrecision
from fastddp.ddp.model import Model
from fastddp.ddp.notices import Notices
from fastddp.ddp.options import Options
from fastddp.ddp.ranks import Meets, Ranks
from fastddp.ddp.start import start
from fastddp.device import memory
from fastddp.device.backward import in_backward
from fastddp.device.compiler import refuse_compiled_autograd, untraced
from fastddp.device.nested import tensors_in
from fastddp.engine import optim_in_backward
from fastddp.engine.hooks import CommHook
from fastddp.engine.news import News
from fastddp.engine.plan import BucketPlan
from fastddp.engine.stats import Stats
from fastddp.watch import events
from fastddp.watch.events import Kind
from fastddp.watch.optimizers import watch_optimizers


class Replica:
    """A copy that starts equal to rank 0's and stays equal.

    Its parts: `model`, what is trained; `ranks`, with whom; `attachment`, the reducers; `buffers`;
    and `changes`, what the ranks do about a model that has become another one. What each does for
    one forward, and in which order, is said here.

    Args:
        module: the module that the script has wrapped.
        group: the ranks that have a copy, or None for a world of one process.
        options: the arguments with which it is wrapped.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None, options: Options) -> None:
        self.options = options
        self.model = Model(module, () if options.delay is None else options.delay.names)
        self.ranks = Ranks(group, Meets.NOW if options.init_sync else Meets.NEVER)
        self.buffers = Buffers(self.model)
        self.changes = ChangeAgreement(self.model)
        self.attachment: Attachment | None = None
        mixed = options.mixed_precision
        param_dtype = None if mixed is None else mixed.param_dtype
        self.low_precision = None if param_dtype is None else LowPrecision(module, param_dtype)
        change_agreement.join_group(self)
        events.start(0, 1)
        watch_optimizers()

        # What others keep here.
        self.authoritative_rank: int | None = None  # whose model a join has given to all
        self.arrivals: Arrivals | None = None  # of gradients, if somebody asks for their times
        self.is_lent = False  # whether `.grad` is a distributed backward's, until that is over
        self.num_accumulated = 0  # micro-batches since the latest step, see fastddp.accumulate

        self._policy = RoundPolicy()
        self._sync = True
        self._decides_at_forward = False
        self._is_detached = False
        self._has_begun = False
        self._former_error = ""  # of a former reducer
        self._notices = Notices()

    # ---- once ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Checks the model, compares it and gives it rank 0's values, see `fastddp.ddp.start`."""
        start(self.model, self.ranks, self.options)

    def start_as_copy(self) -> None:
        """Begins as the copy of a replica that one rank may make alone, or load.

        Where the ranks have yet to meet to share memory, they do so at the first forward that may
        be followed by a backward.
        """
        if self.ranks.meets is Meets.NOW:
            self.ranks.move(Meets.AT_FORWARD)
        self.attach()

    # ---- the reducers ----------------------------------------------------------------------------

    def attach(self) -> None:
        """Hooks the parameters, from now on averaged."""
        ranks, group = self.ranks, self.group
        if group is None or (ranks.alone and self._policy.hook is None):
            return
        if not ranks.alone and self.device.type == "cpu":
            memory.keep()
        transport = ranks.transport(group, self.device)
        attachment = Attachment(self.model, group, transport, self.options, self._policy)
        attachment.reducer.set_on_news(self._on_news())
        self.attachment = attachment
        self.changes.look()
        self._watch_rounds()

    def refresh(self) -> None:
        """Hooks the parameters anew if a conversion gave them another dtype or device.

        Autograd gives a converted parameter a new gradient node, which no hook is on.
        """
        if self.model.is_converted():
            self.reattach()

    def reattach(self) -> None:
        """Hooks the parameters anew; on every rank before the same backward.

        A change of the model that the ranks have not agreed on is still to be announced.

        Raises:
            RuntimeError: if gradients are in flight.
        """
        if self._is_detached:
            return
        self.refuse_in_flight("hooking the parameters anew")
        owes = change_agreement.owes_agreement(self)
        self.changes.doubt()
        self._close()
        self._former_error = self.error
        self.attachment = None
        self.attach()
        if self.attachment is None:
            return
        if self.changes.pending:
            self.attachment.retire()
        if owes:
            self.attachment.reducer.leave_news()

    def detach(self) -> None:
        """Unhooks the parameters, for good: their gradients are this rank's own from now on."""
        self._close()
        self._is_detached = True

    def _close(self) -> None:
        if self.attachment is not None:
            self.attachment.close()

    def move_to(self, group: ProcessGroup) -> None:
        """Averages over the ranks of another group from now on. Collective in that group.

        Raises:
            RuntimeError: if gradients are in flight.
        """
        self.refuse_in_flight("a change of process groups")
        self.ranks = Ranks(group, self.ranks.meets)
        change_agreement.join_group(self)
        self.reattach()

    # ---- what the script decides -----------------------------------------------------------------

    def _decide(self, policy: RoundPolicy) -> None:
        self._policy = policy
        if self.attachment is not None:
            self.attachment.follow(policy)

    @property
    def sync(self) -> bool:
        """Whether a backward that begins now averages gradients."""
        return self._sync

    @sync.setter
    @untraced
    def sync(self, value: bool) -> None:
        self._sync = value
        if not self._decides_at_forward:
            self._decide(replace(self._policy, sync=value))

    @property
    def decides_at_forward(self) -> bool:
        """Whether a backward averages that is in sync when this is set, not when it begins.

        For `join`, where ranks that have run out of inputs are told at the forward.
        """
        return self._decides_at_forward

    @decides_at_forward.setter
    def decides_at_forward(self, value: bool) -> None:
        self._decides_at_forward = value
        self._decide(replace(self._policy, sync=self._sync))

    @property
    def manual(self) -> bool:
        """Whether a round that begins now ends with :meth:`finalize`, not with its backward."""
        return self._policy.manual

    @manual.setter
    @untraced
    def manual(self, value: bool) -> None:
        self._decide(replace(self._policy, manual=value))

    @property
    def divisor(self) -> float | None:
        """The number that gradients are divided by; None for the number of ranks."""
        return self._policy.divisor

    @divisor.setter
    def divisor(self, value: float | None) -> None:
        self._decide(replace(self._policy, divisor=value))

    @property
    def hook(self) -> CommHook | None:
        """What communicates gradients in place of the all-reduce; None for nothing."""
        return self._policy.hook

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
        self._decide(replace(self._policy, hook=hook))
        if self.attachment is None:
            self.attach()  # a world of one: its hook may be one that steps an optimizer

    # ---- manual rounds ---------------------------------------------------------------------------

    @property
    def is_in_flight(self) -> bool:
        """Whether the gradients of a backward that is over wait for :meth:`finalize`."""
        return self.attachment is not None and self.attachment.is_in_flight()

    @property
    def ends_after_backward(self) -> bool:
        """Whether the next round has to wait for the end of its backward to be finalized.

        Then something follows that all ranks have to do at the same time, and not while another
        model's round is under way: to agree on a change of the model, or to average delayed
        gradients.
        """
        return bool(self.changes.pending) or (
            self.attachment is not None and self.options.delay is not None
        )

    def finalize(self) -> None:
        """Ends a manual round: waits for what is in flight and has it in ``.grad``.

        Does nothing where nothing is synchronised.

        Raises:
            RuntimeError: if there is no such round, or not yet one that may be ended.
        """
        if self.attachment is None or (self._is_detached and not self.is_in_flight):
            return
        if in_backward() and self.ends_after_backward:
            why = self.changes.pending or "gradients are delayed (delay_all_reduce_named_params)"
            raise RuntimeError(
                f"fastddp: rank {self.ranks.rank}: finalize_backward() has to wait for the end of"
                f" this backward: {why}. Where should_finalize_after_backward is True after"
                " forward, call it after backward"
            )
        # The delayed ones first: the end of the round may bring the news that the model has
        # changed, and parameters are hooked anew only where no gradients are in flight.
        self.attachment.finalize_delayed()
        self.attachment.finalize()

    def refuse_in_flight(self, call: str) -> None:
        """Refuses what would lose gradients that are in flight, or add to them.

        Args:
            call: what the script has called, for the message.

        Raises:
            RuntimeError: if there are any.
        """
        if self.is_in_flight:
            raise RuntimeError(
                f"fastddp: rank {self.ranks.rank}: {call} while the gradients of the latest"
                " backward are in flight; call finalize_backward() first"
            )

    # ---- every forward ---------------------------------------------------------------------------

    @untraced
    def record(self, kind: Kind) -> None:
        """Records an event of a forward: the step is the number of rounds that have ended."""
        step = self.attachment.reducer.rounds if self.attachment is not None else 0
        events.record(kind, self.model.owner.number, step)

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
        self.buffers.before_forward(self.ranks, self.options.forward_sync_buffers)
        if self.buffers.has_futures:
            self._watch_rounds()

    @untraced
    def after_forward(self, output: object) -> None:
        """Takes note of where backward will come from, and whether it may be synchronised."""
        if not torch.is_grad_enabled():
            return
        self.buffers.after_forward(self.ranks, self.options.forward_sync_buffers)
        if self.buffers.has_futures:
            self._watch_rounds()
        self.buffers.sync_next = self._sync
        if self.attachment is None:
            return
        refuse_compiled_autograd()
        self.notice_change(after_forward=True)
        self.attachment.watch(list(tensors_in(output)))

    def begin(self) -> None:
        """Makes ready for a forward, or for that of other ranks.

        Takes over, at the first one, optimizers that parameters got after wrapping.
        """
        attachment = self.attachment
        if attachment is not None and not attachment.settle():
            warnings.warn(
                f"fastddp: rank {self.live_group.rank()}: a backward of this model has been running"
                " in another thread for 10 s while its next forward waits; if it raised, this"
                " rank's collectives are out of order from now on",
                RuntimeWarning,
                stacklevel=2,
            )
        if self._has_begun:
            return
        self._has_begun = True
        if attachment is not None:
            attachment.take_over_optimizers()
            self._watch_rounds()

    def meet(self) -> None:
        """Has a copy share memory with the other ranks, see :meth:`start_as_copy`. Collective."""
        if self.ranks.meets is not Meets.AT_FORWARD:
            return
        self.ranks.move(Meets.NOW)
        group, attachment = self.group, self.attachment
        if group is None or attachment is None:
            return
        if self.ranks.transport(group, self.device) is not attachment.transport():
            self.reattach()

    def buffers_due(self) -> Mapping[str, torch.Tensor]:
        """Returns the buffers that are to be made equal now; none if it is not the time."""
        return self.buffers.due(self.ranks, self.options.forward_sync_buffers)

    def wait_after_backward(self, futures: Iterable[Future]) -> None:
        """Has futures waited for at the end of the next round."""
        self.buffers.add_futures(futures)
        self._watch_rounds()

    def shadow(self) -> None:
        """Takes part in a round of the other ranks with nothing to add. Collective."""
        if self.attachment is not None:
            self.attachment.shadow()
            self.attachment.shadow_delayed()

    # ---- a model that changes --------------------------------------------------------------------

    def notice_change(self, *, after_forward: bool = False) -> None:
        """Leaves parameters alone that are no longer those that were hooked.

        The next round tells the other ranks; at its end all compare their models and average the
        gradients of that round, then those of the parameters that there are now.
        """
        attachment = self.attachment
        if attachment is None or self.changes.pending or self._is_detached or in_backward():
            return
        if self.is_in_flight:  # a retired reducer would drop the gradients; later is soon enough
            return
        self.changes.notice(attachment, after_forward=after_forward)

    def settle_news(self) -> None:
        """Agrees with the other ranks on changes for which they wait. Collective then.

        Of all models on the group: see :func:`fastddp.ddp.change_agreement.settle`.
        """
        group = self.group
        if group is not None:
            change_agreement.settle(group)

    def _on_news(self) -> Callable[[News], None]:
        this = weakref.ref(self)

        @untraced
        def on_news(news: News) -> None:
            alive = this()
            if alive is None:
                return
            if news is News.EMPTY:
                alive._notices.empty(alive.model.owner.title, alive.live_group.rank())
            else:
                alive.changes.answer(alive, news)

        return on_news

    # ---- the end of a round ----------------------------------------------------------------------

    def _watch_rounds(self) -> None:
        """Has the end of the next round seen here; without need it costs nothing."""
        this = weakref.ref(self)

        @untraced
        def end_round() -> None:
            alive = this()
            if alive is not None:
                alive._end_round()

        if self.attachment is not None:
            self.attachment.reducer.set_after_round(end_round)

    def _end_round(self) -> None:
        """Does what has to follow the averaging."""
        attachment = self.attachment
        assert attachment is not None
        self._notices.unused(attachment.reducer.unused, self.live_group.rank())
        self.buffers.wait(self.ranks)
        optim_in_backward.step(attachment.stepping)
        if not attachment.stepping:
            attachment.reducer.set_after_round(None)

    # ---- facts -----------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The module that the script has wrapped."""
        return self.model.module

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.model.device

    @property
    def alone(self) -> bool:
        """Whether the world is one process, and nothing is synchronised."""
        return self.ranks.alone

    @property
    def group(self) -> ProcessGroup | None:
        """The group; None for a world of one process, and after the group was destroyed."""
        return self.ranks.group

    @property
    def live_group(self) -> ProcessGroup:
        """The group, where there must be one."""
        return self.ranks.live_group

    @property
    def hooked(self) -> Collection[nn.Parameter]:
        """The parameters whose gradients the reducer averages."""
        return self.model.hooked

    @property
    def has_begun(self) -> bool:
        """Whether there was a forward, on this rank or on others."""
        return self._has_begun

    def stats(self) -> Stats:
        """Returns what synchronisation has cost this rank so far, see `Stats`."""
        return self.attachment.reducer.stats() if self.attachment is not None else Stats()

    @property
    def error(self) -> str:
        """The text of the latest error in a backward of the model; empty if there was none."""
        mine = self.attachment.reducer.error() if self.attachment is not None else ""
        return mine or self._former_error

    def used_by(self) -> Sequence[int]:
        """Returns, by hooked parameter, how many ranks had a gradient in the latest round."""
        return self.attachment.reducer.used_by() if self.attachment is not None else []

    def plan(self) -> BucketPlan:
        """Returns which gradient is reduced in which bucket; empty for a world of one process."""
        return self.attachment.reducer.plan() if self.attachment is not None else BucketPlan(())
