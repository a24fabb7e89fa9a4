"""The reducer itself: what the wrapper calls, and what autograd calls.

:mod:`fastddp.engine.python` describes the life of a round.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup

from fastddp.comm.groups import name_of
from fastddp.comm.patience import is_shm, way_to_wait
from fastddp.device.backward import at_end_of_backward, on_backward, wait_until
from fastddp.device.compiler import refuse_compiled_autograd, untraced
from fastddp.device.profiled import profiled
from fastddp.device.streams import has_streams, is_capturing
from fastddp.engine.hooks import BucketRunner
from fastddp.engine.interface import Settings, Subject
from fastddp.engine.launch_order import Turn, order_of
from fastddp.engine.news import News
from fastddp.engine.plan import BucketPlan
from fastddp.engine.python import refusals
from fastddp.engine.python.agreements import Agreements
from fastddp.engine.python.buckets import Buckets
from fastddp.engine.python.context import Context
from fastddp.engine.python.figures import Figures, noting_errors
from fastddp.engine.python.installation import Installation
from fastddp.engine.python.launchers import AllReduceLauncher, HookLauncher, Launcher
from fastddp.engine.python.manner import Gives, Manner
from fastddp.engine.python.mark_reader import MarkReader
from fastddp.engine.python.nodes import backward_accumulates
from fastddp.engine.python.parameters import Parameter
from fastddp.engine.python.phase import PHASES, Phase, move
from fastddp.engine.python.round import Round
from fastddp.engine.schedule import Schedule
from fastddp.engine.stats import Stats
from fastddp.engine.weak_group import WeakGroup
from fastddp.watch.events import Kind
from fastddp.watch.layout import id_of
from fastddp.watch.model_place import ModelPlace


class PythonReducer:
    """See :class:`fastddp.engine.interface.Reducer`."""

    def __init__(self, subject: Subject, group: ProcessGroup, settings: Settings) -> None:
        self.sync = True
        self.manual = False
        self.began_ns = 0  # of the latest round
        self._frozen = list(subject.frozen)
        self._is_lazy = settings.lazy
        self._divisor = float(group.size())
        self._after_round: Callable[[], None] | None = None
        self._on_news: Callable[[News], None] | None = None
        self._is_closed = False
        self._is_retired = False
        self._is_checked = False  # for parameters that are stale, since the latest round
        self._knows_counts = False  # a round has ended well on this rank
        self._phase = Phase.BETWEEN
        self._round: Round | None = None  # while the phase is FILLING or IN_FLIGHT

        params = subject.params
        device = params[0].device if params else torch.device("cpu")
        self._context = context = Context(
            WeakGroup(group),
            group.rank(),
            device,
            subject.number,
            subject.title,
            id_of(name_of(group)),
            way_to_wait(group, device),
        )
        self._on_board = ModelPlace(context.number, context.group_id)
        self._order_in_group = order_of(group)
        self._order_in_group.introduce(subject.number, subject.title)
        self._turn = Turn(self._order_in_group, id(self))
        self.figures = Figures(subject.number)
        self._marks = MarkReader(context, self._order_in_group)
        self._agreements = Agreements(context)
        may_launch_late = bool(params) and is_shm(group, device)
        self._all_reduce = AllReduceLauncher(
            context, settings.comm_dtype, may_launch_late=may_launch_late
        )
        self._launcher: Launcher = self._all_reduce

        num_dense = len(params) - subject.num_sparse
        self._parameters = [
            Parameter(index, param, name, is_sparse=index >= num_dense)
            for index, (param, name) in enumerate(zip(params, subject.names, strict=True))
        ]
        self._installation = Installation(self._parameters, settings, context)
        # Until the arrival order is known: gradients come back roughly in the reverse order.
        self._replan(list(reversed(range(num_dense))))
        this = weakref.ref(self)
        for index, param in enumerate(self._parameters):
            param.hook(_gradient_hook(this, index))

    def __del__(self) -> None:
        self._turn.end()
        self._on_board.free()
        self._round = None
        del self._launcher  # a hook's buffers are views, which hold what they are views of
        self._installation.settle()

    # ---- what the wrapper sets and asks ----------------------------------------------------------

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        this = weakref.ref(self)

        def begin() -> None:
            alive = this()
            if alive is not None:
                alive._on_backward()

        on_backward(outputs, begin)

    def set_divisor(self, divisor: float) -> None:
        self._divisor = divisor

    def set_hook(self, hook: BucketRunner) -> None:
        self._launcher = HookLauncher(hook, self._context, self._all_reduce)
        self._replan(self._installation.order())
        self._installation.uninstall()  # slots and flags lie elsewhere now

    def set_after_round(self, callback: Callable[[], None] | None) -> None:
        self._after_round = callback

    def set_on_news(self, callback: Callable[[News], None]) -> None:
        self._on_news = callback

    @property
    def rounds(self) -> int:
        return self.figures.stats.rounds

    @property
    def has_left_news(self) -> bool:
        return self._marks.has_left_news

    def read_left_news(self) -> bool:
        return self._marks.read_left_news()

    def leave_news(self) -> None:
        self._marks.leave_news()

    def is_stale(self) -> bool:
        self._is_checked = True
        return not self._is_closed and any(p.has_become_another() for p in self._parameters)

    def retire(self) -> None:
        for param in self._parameters:  # the others' gradients go on to begin rounds
            if param.has_become_another():
                param.unhook()  # or autograd would go on with a node that does not fit
        self._announce_change()

    def _announce_change(self) -> None:
        self._is_retired = True
        if self._installation.buckets is not None:
            self._installation.buckets.announce_change()

    def outgrown(self) -> bool:
        return any(param.requires_grad for param in self._frozen)

    def settle(self) -> bool:
        # When a backward on a GPU raises, the thread that autograd ran it in may be the last to let
        # go of it, a moment after the caller got its exception. What the caller launches next would
        # come before the rest of the round, on this rank alone.
        return not has_streams(self._context.device) or wait_until(
            lambda: self._phase in (Phase.BETWEEN, Phase.IN_FLIGHT)
        )

    def is_in_flight(self) -> bool:
        return self._phase is Phase.IN_FLIGHT

    def unused(self) -> list[str]:
        return self.figures.unused

    def error(self) -> str:
        return self.figures.error

    def stats(self) -> Stats:
        return self.figures.stats

    def plan(self) -> BucketPlan:
        return self._installation.plan

    def used_by(self) -> list[int]:
        if self._round is not None:
            refusals.flags_of_a_round_under_way(self._context)
        buckets = self._installation.buckets
        if self.figures.stats.rounds == 0 or buckets is None:
            return [self._context.group().size()] * len(self._parameters)
        return buckets.used_by()

    def close(self) -> None:
        self._is_closed = True
        self._after_round = None
        for param in self._parameters:
            param.unhook()

    # ---- rounds that no backward begins, and the end of a manual one -----------------------------

    @torch.no_grad()
    def shadow(self) -> None:
        self._begin_round(Gives.NOTHING)
        self._finish_round()

    @torch.no_grad()
    def average(self) -> None:
        self._begin_round(Gives.WHAT_IS_THERE)
        self._finish_round()

    @torch.no_grad()
    @noting_errors
    def finalize(self) -> None:
        current = self._round
        if current is None or not current.manner.is_manual:
            refusals.finalization_of_nothing(self._context)
        if current.manner.is_captured != is_capturing(self._context.device):
            refusals.finalization_in_another_graph(self._context)
        if self._phase is Phase.IN_FLIGHT:
            self._check_params(current)
            self._finish_round()
            return
        if not current.is_all_launched() and not self._turn.has_come():
            others = self._order_in_group.others(self._context.number)
            refusals.finalization_out_of_turn(self._context, others)
        self._finish_round(then=Phase.FINALIZED)

    def _check_params(self, current: Round) -> None:
        """Checks that parameters still have the layouts of the gradients that are in flight."""
        for param in self._parameters:
            if not self._is_retired and not param.layout.is_that_of(param.tensor):
                self._drop(current)
                refusals.finalization_of_another_layout(self._context, param)

    # ---- called by autograd ----------------------------------------------------------------------

    @torch.no_grad()
    @noting_errors
    def _on_backward(self) -> None:
        is_between = self._phase is Phase.BETWEEN
        if self._is_closed or self._phase is Phase.FILLING or (is_between and not self.sync):
            return
        if not backward_accumulates({param.node for param in self._parameters}):
            return
        if not is_between:
            what = f"backward has reached an output of {self._context.title}"
            refusals.backward_in(self._phase, self._context, what)
        if self._is_retired or any(param.tensor.requires_grad for param in self._parameters):
            self._begin_backward()

    @torch.no_grad()
    @noting_errors
    def _on_gradient(self, index: int) -> None:
        param = self._parameters[index]
        if self._phase is not Phase.FILLING:
            if self._phase is not Phase.BETWEEN:
                what = f"parameter '{param.name}' got a gradient"
                refusals.backward_in(self._phase, self._context, what)
            if not self.sync:
                param.note_left()
                return
            self._begin_backward()
        if not self._is_retired:
            assert self._round is not None
            self._round.take(param)
            self._on_board.set_last_param(index)
            self._on_board.set_launched(len(self._round.launches))

    @torch.no_grad()
    @noting_errors
    def _end_backward(self, ok: bool) -> None:
        current = self._round
        if self._phase is Phase.FINALIZED:
            # What came after the hook that finalized has autograd's caller wait for its stream.
            self._move_to(Phase.BETWEEN)
        elif current is None:
            return
        elif not ok:
            self._abandon_round(current)
        elif current.manner.is_manual:
            self._leave_in_flight(current)
        else:
            self._finish_round()

    # ---- a round's begin -------------------------------------------------------------------------

    def _begin_backward(self) -> None:
        self._begin_round(Gives.BACKWARD)
        at_end_of_backward(self._end_backward)

    def _begin_round(self, gives: Gives) -> None:
        refuse_compiled_autograd()  # or gradients get lost without a word
        move(self._phase, Phase.FILLING)  # refused before anything has changed
        self._context.record(Kind.ROUND_BEGIN, self.rounds)
        is_captured = is_capturing(self._context.device)
        if is_captured:
            self._check_capture()
        else:
            self._read_news(gives)
            self._await_agreements()
        if not self._is_checked and self.is_stale():
            self._announce_change()
        self._is_checked = False
        buckets = self._install(is_captured)
        is_manual = self.manual and gives is Gives.BACKWARD
        is_early = self._agreements.schedule.begin()
        manner = Manner(
            gives,
            is_retired=self._is_retired,
            is_manual=is_manual,
            is_early=is_early or not self._launcher.may_launch_late or is_manual,
            is_captured=is_captured,
            knows_counts=self._knows_counts,
            is_followed=(
                buckets.flags is not None
                or not self._agreements.order_is_learned
                or self._is_timing_due
            ),
            scale=self._launcher.scale(self._divisor),
        )
        self._round = Round(
            manner,
            self.rounds,
            self._parameters,
            buckets,
            self._launcher,
            self._turn,
            self._context,
        )
        self._move_to(Phase.FILLING)
        self._turn.begin()
        self.began_ns = self._round.times.began_ns

    def _check_capture(self) -> None:
        """Checks that this round, which a graph records, has nothing to wait for or to allocate.

        All ranks capture the same rounds, so all of them put off their agreements.
        """
        if self._installation.buckets is None or self._agreements.is_order_under_way:
            refusals.capture_too_early(self._context)
        if self._is_lazy:
            refusals.capture_of_lazy_buckets(self._context)

    def _read_news(self, gives: Gives) -> None:
        """Reads what ranks have said in earlier rounds, where this one could not know it yet."""
        if gives is Gives.BACKWARD and self.read_left_news():
            self.leave_news()
            refusals.backward_before_agreement(self._context)
        if self._marks.take_late(waits=False) and self._on_news is not None:
            self._on_news(News.CHANGED_BEFORE)

    def _install(self, is_captured: bool) -> Buckets:
        """Returns the plan's buckets, in memory that this round may write to."""
        buckets = self._installation.buckets
        if buckets is not None:
            buckets.begin_round(is_captured)
            return buckets
        buckets = self._installation.install(self._launcher.form, has_changed=self._is_retired)
        self.figures.note_plan(buckets.num_bytes(), buckets.num_dense)
        return buckets

    def _await_agreements(self) -> None:
        order = self._agreements.await_order()
        if order is not None:
            self._replan(order)
        self._agreements.await_schedule()

    @property
    def _is_timing_due(self) -> bool:
        return self._launcher.may_launch_late and self._agreements.schedule.is_due

    def _replan(self, order: Sequence[int]) -> None:
        self._agreements.schedule = Schedule()  # here, where all ranks are in the same round
        self._installation.replan(order, self._launcher.form)

    # ---- a round's end ---------------------------------------------------------------------------

    def _leave_in_flight(self, current: Round) -> None:
        self._context.record(Kind.BACKWARD_END)
        try:
            self._launch_rest(current, waits=False)
        except BaseException:
            self._drop(current)
            raise
        self._move_to(Phase.IN_FLIGHT)

    def _finish_round(self, then: Phase = Phase.BETWEEN) -> None:
        """Waits until the round's gradients are reduced, and writes them to ``.grad``."""
        current = self._round
        assert current is not None
        start = time.perf_counter()
        try:
            with profiled("fastddp.reducer::finish_round"):
                if self._phase is Phase.FILLING:
                    self._context.record(Kind.BACKWARD_END)
                    self._launch_rest(current, waits=True)
                current.wait()
            end = time.perf_counter()
        except BaseException:
            self._drop(current, then)
            raise
        self._round = None
        self._move_to(then)
        manner = current.manner
        has_changed = not manner.is_captured and self._marks.read(
            current.buckets.marks(), at_once=self._is_retired
        )
        current.hand_out()
        self.figures.note_unused_by_all(param.name for param in current.unused_by_all())
        if self._is_lazy:
            current.leave_buckets()
        self.figures.note_round(current.times, start, end, overlaps=manner.is_early)
        self._show_phase()
        if manner.gives is Gives.BACKWARD:
            self._knows_counts |= not manner.is_retired
            self.figures.note_unused_here(current.unused_here())
        if manner.gives is not Gives.NOTHING:
            self._agreements.schedule.add(manner.is_early, current.times.us_so_far())
        self._context.record(Kind.ROUND_END, current.step)
        if self._on_news is not None and (has_changed or current.is_empty()):
            self._on_news(News.CHANGED if has_changed else News.EMPTY)
        if current.fill.error is not None:
            raise current.fill.error
        if has_changed:
            return  # what comes after a round comes after that of the next reducer
        if self._after_round is not None:
            self._after_round()

    def _launch_rest(self, current: Round, *, waits: bool) -> None:
        """Launches what is left of the round, and what the ranks agree on after it."""
        current.launch_rest(waits=waits)
        self._on_board.set_launched(len(current.launches))
        gives = current.manner.gives
        if not self._agreements.order_is_learned and gives is not Gives.WHAT_IS_THERE:
            self._agreements.start_with_order(current.order())
        if self._is_timing_due:
            self._agreements.start_with_schedule()
        self._turn.end()

    def _abandon_round(self, current: Round) -> None:
        self._context.record(Kind.ERROR)
        # The backward's own exception is on its way to the user, and says more than an error here.
        # Autograd's thread, with no node running, is on the default stream, which nothing orders
        # behind the round before.
        try:
            with contextlib.suppress(Exception), current.stream or contextlib.nullcontext():
                self._launch_rest(current, waits=False)
                waits = [launch.wait for launch in current.launches]
                self._marks.leave(waits, current.buckets.marks())
        finally:
            self._drop(current)

    def _drop(self, current: Round, then: Phase = Phase.BETWEEN) -> None:
        """Ends a round that failed. Collectives may write to its buckets; the next has others."""
        self._installation.uninstall([launch.wait for launch in current.launches])
        self._turn.end()
        self._context.record(Kind.ROUND_END, current.step)
        self._round = None
        self._move_to(then)

    def _move_to(self, phase: Phase) -> None:
        self._phase = move(self._phase, phase)
        self._show_phase()

    def _show_phase(self) -> None:
        """Shows on the board of this process what this reducer has come to."""
        self._on_board.set_phase(PHASES.index(self._phase), self.figures.stats.rounds)


def _gradient_hook(reducer: weakref.ref[PythonReducer], index: int) -> Callable[..., None]:
    @untraced
    def hook(_: object, gradients: tuple[torch.Tensor | None, ...]) -> None:
        # A node runs without a gradient too, when a custom backward returns none.
        alive = reducer() if gradients[0] is not None else None
        if alive is not None:
            alive._on_gradient(index)

    return hook
