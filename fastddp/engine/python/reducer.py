"""The Python engine: the reducer's specification, in plain torch.

One synchronised backward is a *round*. Its life:

* it begins: ``_begin_round`` installs the plan if a new one is due and asks autograd to call back
  at the end of this backward.
* each gradient: ``_take`` scales it into its place, empties ``.grad`` and launches the buckets that
  are full, in plan order.
* end of backward: ``_finish_round`` launches what is left, waits, and makes each ``.grad`` the
  reduced slot.
* backward raised: ``_abandon_round`` launches what is left and waits for nothing but hooks.
* a manual round: the end of backward launches what is left and leaves it in flight; ``finalize``,
  which the script calls, does the rest. Called before backward is over it does all of it.

A round begins when backward reaches an output of forward, or at the first gradient if there is no
such output. The former is the same on every rank, whatever parameters it goes on to reach, and is
outside of any re-entrant backward.

Every rank launches every bucket in every round, also those it has no gradient for, and then every
sparse gradient, so ranks stay in step when they use different parameters or when one of them
raises. ``.grad`` is empty while its bucket is in flight, so nothing but the collective can touch a
launched bucket.

What becomes ``.grad`` is an alias of the slot and belongs to the script, which may do with it what
it likes: the slot itself stays here. A bucket whose memory the script still refers to when the next
round begins, other than by ``.grad``, is left to it, and the round goes on in memory of its own.

With lazy buckets, a bucket's memory is allocated in the round, when its first gradient arrives, and
is left to the script at its end: only the ``.grad``s refer to it then.

Each bucket ends with marks (``marks.py``), by which ranks find out that they have added up
different buckets, and that the model of one of them has changed since it was wrapped. A reducer
whose model has changed is *retired*: it takes part in rounds with nothing to add until another one
takes its place.

On a GPU whatever touches a bucket waits for the streams that have touched it before, by events; the
host waits for nothing but the flags of parameters that this rank has no gradient for. At the end of
a round the stream that called backward is behind all of it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial, wraps
from typing import Any, NoReturn, cast
from typing import ParamSpec as CallSpec

import torch
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed import ProcessGroup, Work
from torch.distributed.distributed_c10d import AllreduceOptions

from fastddp.comm.labels import labelled
from fastddp.comm.loans import Loan, settle, without_context
from fastddp.device.backward import at_end_of_backward, on_backward, wait_until
from fastddp.device.compiler import refuse_compiled_autograd, untraced
from fastddp.device.flat import widened, write
from fastddp.device.profiled import profiled
from fastddp.device.streams import (
    LateCopy,
    Touched,
    drain_current_stream,
    has_streams,
    home_of,
    is_capturing,
    keep_for_current,
)
from fastddp.engine.hooks import BucketRunner, GradBucket, Wait
from fastddp.engine.launch_order import order_of
from fastddp.engine.marks import any_changed, is_mixed, label_of, marks_of, set_changed
from fastddp.engine.news import News
from fastddp.engine.plan import (
    CAST_ALIGN_BYTES,
    NUM_MARKS,
    PACKED_ALIGN_BYTES,
    SLOT_ALIGN_BYTES,
    BucketPlan,
    ParamSpec,
    Slot,
    plan_buckets,
)
from fastddp.engine.schedule import Schedule
from fastddp.engine.stats import RoundStats

P = CallSpec("P")


class _Phase(Enum):
    """Where a reducer is in the life of a round."""

    BETWEEN = "between rounds"
    FILLING = "backward brings gradients"
    IN_FLIGHT = "backward is over, all is launched, and finalize() is to come"
    FINALIZED = "finalize() has come, but the backward is not over yet"


@dataclass(slots=True)
class _Place:
    """Where a parameter's gradient goes under the installed plan."""

    bucket: int
    """-1 for a sparse gradient, which has no place in one."""
    slot: torch.Tensor
    """Where its reduced gradient lies. For a sparse one, what the round makes of it."""
    sent: torch.Tensor
    """Where it lies to be reduced: the slot as real numbers, or its like in the bucket's wire."""
    flag: torch.Tensor
    """One element: whether any rank had a gradient."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """An installed bucket."""

    flat: torch.Tensor
    """What the slots are in."""
    wire: torch.Tensor
    """What is reduced: ``flat`` itself unless there is a dtype for communication."""
    gradients: torch.Tensor
    """The part of ``flat`` that a hook is given."""
    flags: torch.Tensor
    """In its tail, so that they need no collective; or in the loose ones."""
    marks: torch.Tensor | None
    """Behind the flags; None if these are loose ones."""
    sent_marks: torch.Tensor
    """What this rank sets them to."""
    loan: Loan
    storage: torch.UntypedStorage
    """Of ``flat``."""
    num_references: int
    """To the storage, from in here."""
    home: torch.Stream | None
    """That it was allocated on."""


@dataclass(frozen=True, slots=True)
class _Bystander:
    """A gradient that the round's own backward did not produce, as it was before the round."""

    param: int
    grad: torch.Tensor | None


@dataclass(slots=True)
class _Round:
    is_shadow: bool
    """Of a round of the other ranks."""
    takes_all: bool
    """Whether it averages what is in ``.grad``, not what a backward brings."""
    missing: list[int]
    """By bucket, gradients still to come."""
    is_manual: bool
    """Whether ``finalize`` ends it, not the end of its backward."""
    is_early: bool
    """Whether buckets are launched as they fill."""
    is_captured: bool
    """Whether it is recorded into a graph."""
    touched: list[Touched]
    """By bucket; the last is of the sparse gradients."""
    stream: torch.Stream | None
    """That it began on."""
    begin: float = field(default_factory=time.perf_counter)
    backward_us: float = 0.0
    """From there until its backward was through, or ``finalize`` called."""
    began_ns: int = field(default_factory=time.time_ns)
    launched: float | None = None
    """When the first collective was."""
    next_bucket: int = 0
    taken: Counter[int] = field(default_factory=Counter)
    """By parameter, gradients so far."""
    arrival: list[int] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    """In the order of launching."""
    bystanders: list[_Bystander] = field(default_factory=list)
    aliases: dict[int, torch.Tensor] = field(default_factory=dict)
    """By parameter, what was in ``.grad``, if that is as it was handed out."""
    error: RuntimeError | None = None
    """What is wrong with a gradient, for the end of the round."""


_Marked = list[tuple[int, torch.Tensor]]
"""By collective of a round, its marks."""


@dataclass(slots=True)
class _LeftNews:
    """What there is to know of a round that its backward has left by an exception."""

    waits: list[Wait]
    marked: _Marked
    has_changed: bool = False


def _noting_errors(entry: Callable[P, None]) -> Callable[P, None]:
    """Has the reducer, whose method this is, keep what an error of it says."""

    @wraps(entry)
    def noting(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            entry(*args, **kwargs)
        except Exception as error:
            cast(PythonReducer, args[0])._error = str(error)
            raise

    return noting


class PythonReducer:
    """See :class:`fastddp.engine.interface.Reducer`."""

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        num_sparse: int,
        frozen: Sequence[torch.Tensor],
        group: ProcessGroup,
        caps_bytes: Sequence[int],
        comm_dtype: torch.dtype | None = None,
        owner: int = 0,
        title: str = "the model",
        lazy: bool = False,
    ) -> None:
        self.sync = True
        self.manual = False
        self._closed = False
        self._retired = False
        self._is_checked = False  # for parameters that are stale, since the latest round
        self._owner = owner
        self._title = title
        self._hook: BucketRunner | None = None
        self._late_marks: deque[tuple[LateCopy, list[int]]] = deque()  # of rounds, on a device
        self._left_news: _LeftNews | None = None
        self.began_ns = 0  # of the latest round
        self._loose: _Memory | None = None  # flags that travel in no bucket, and marks
        self._memory: dict[int, _Memory] = {}  # by bucket; lazy ones are there in rounds only
        self._sent_marks: dict[int, torch.Tensor] = {}  # by launch
        self._left_flags: dict[int, torch.Tensor] = {}  # of lazy ones, since the latest round
        self._installed = False  # whether these are the plan's
        self._lazy = lazy
        self._captured = False  # whether a graph refers to them
        self._of_graphs: list[_Memory] = []  # former buckets that graphs refer to
        self._abandoned: list[Wait] = []  # for collectives that may still write to them
        self._params = list(params)
        self._device = params[0].device if params else torch.device("cpu")
        self._comm_dtype = comm_dtype
        self._names = list(names)
        self._num_dense = len(params) - num_sparse
        self._frozen = list(frozen)
        self._specs = [ParamSpec.of(param) for param in params[: self._num_dense]]
        # Weak: whoever frees a process group last joins its threads, and must not hold the GIL.
        self._group_ref = weakref.ref(group)
        self._order_in_group = order_of(group)
        self._order_in_group.introduce(owner, title)
        self._rank = group.rank()
        # Whether a collective that is waited for at once costs no switch of threads.
        self._runs_inline = _runs_inline(group, params)
        self._divisor = float(group.size())
        self._caps_bytes = list(caps_bytes)
        self._after_round: Callable[[], None] | None = None
        self._on_news: Callable[[News], None] | None = None
        # Until the arrival order is known: gradients come back roughly in the reverse order.
        self._plan = BucketPlan(())
        self._replan(list(reversed(range(self._num_dense))))

        self._places: dict[int, _Place] = {}
        self._bucket_of: dict[int, int] = {}  # by parameter, if dense
        # By parameter, the gradient that unsynchronised backwards have left, so long as nobody
        # replaces or drops it.
        self._accumulated: dict[int, tuple[int, Any]] = {}
        self._expected = [1] * len(self._params)  # gradients per round: the most there have been
        self._used = [True] * len(self._params)  # by any rank, when a flag was last read
        # What the ranks agree on between two rounds, on its way: the order of arrival in the first
        # round, and how long rounds take.
        self._order: tuple[torch.Tensor, Work] | None = None
        self._timing: tuple[torch.Tensor, Work] | None = None
        self._order_is_learned = False
        self._counts_are_learned = False  # a round has ended well on this rank
        self._stats = RoundStats()
        self._unused: list[str] = []
        self._unused_last: list[int] | None = None  # by this rank, in the latest round
        self._error = ""
        self._phase = _Phase.BETWEEN
        self._round: _Round | None = None  # while the phase is one of the two in the middle

        self._layouts = [_Layout.of(param) for param in self._params]
        # A tensor holds its gradient node weakly: kept here, or the hook would go with the node.
        nodes = [_accumulator(param) for param in self._params]
        self._nodes: list[Node | None] = [*nodes]
        this = weakref.ref(self)
        self._hooks = [
            node.register_hook(_gradient_hook(this, nth)) for nth, node in enumerate(nodes)
        ]

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
        self._hook = hook
        self._replan([slot.param for bucket in self._plan.buckets for slot in bucket.slots])
        self._installed = False  # slots and flags lie elsewhere now

    def set_after_round(self, callback: Callable[[], None] | None) -> None:
        self._after_round = callback

    def set_on_news(self, callback: Callable[[News], None]) -> None:
        self._on_news = callback

    @property
    def has_left_news(self) -> bool:
        return self._left_news is not None

    def read_left_news(self) -> bool:
        left, self._left_news = self._left_news, None
        if left is None:
            return False
        try:
            for wait in left.waits:
                wait()
            marked = ((launch, marks.tolist()) for launch, marks in left.marked)
            return self._check_marks(marked) or left.has_changed
        except RuntimeError:  # what comes next on the group says more
            return left.has_changed

    def leave_news(self) -> None:
        self._left_news = _LeftNews([], [], has_changed=True)

    def is_stale(self) -> bool:
        self._is_checked = True
        return not self._closed and any(
            self._has_become_another(index) for index in range(len(self._params))
        )

    def _has_become_another(self, index: int) -> bool:
        param, layout, node = self._params[index], self._layouts[index], self._nodes[index]
        return node is None or not layout.is_that_of(param) or layout.has_moved(param, node)

    def retire(self) -> None:
        for index in range(len(self._params)):  # the others' gradients go on to begin rounds
            if self._has_become_another(index):
                self._hooks[index].remove()
                self._nodes[index] = None  # or autograd would go on with a node that does not fit
        self._announce_change()

    def _announce_change(self) -> None:
        self._retired = True
        for marks in self._sent_marks.values():
            set_changed(marks)

    def outgrown(self) -> bool:
        return any(param.requires_grad for param in self._frozen)

    def settle(self) -> bool:
        # When a backward on a GPU raises, the thread that autograd ran it in may be the last to let
        # go of it, a moment after the caller got its exception. What the caller launches next would
        # come before the rest of the round, on this rank alone.
        return not has_streams(self._device) or wait_until(
            lambda: self._phase in (_Phase.BETWEEN, _Phase.IN_FLIGHT)
        )

    @torch.no_grad()
    def shadow(self) -> None:
        self._begin_round(is_shadow=True)
        self._finish_round()

    @torch.no_grad()
    def average(self) -> None:
        self._begin_round(takes_all=True)
        self._finish_round()

    def is_in_flight(self) -> bool:
        return self._phase is _Phase.IN_FLIGHT

    @torch.no_grad()
    @_noting_errors
    def finalize(self) -> None:
        current = self._round
        if current is None or not current.is_manual:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: finalize_backward(), but no gradients are in flight;"
                " call it once for each synchronised backward that began with"
                " require_manual_backward_finalization = True"
            )
        if current.is_captured != is_capturing(self._device):
            raise RuntimeError(
                f"fastddp: rank {self._rank}: finalize_backward() has to be captured into the graph"
                " that its backward was captured into; call it within the same capture"
            )
        if self._phase is _Phase.IN_FLIGHT:
            self._check_params(current)
            self._finish_round()
            return
        if not self._is_all_launched(current) and not self._order_in_group.may_launch(id(self)):
            raise RuntimeError(
                f"fastddp: rank {self._rank}: finalize_backward() of {self._title} in the middle of"
                " a backward that reached another model on the same group before"
                f" ({self._order_in_group.others(self._owner)}), which still has gradients to send;"
                " finalize that one first, or call this when backward is over"
            )
        self._finish_round(then=_Phase.FINALIZED)

    def _check_params(self, current: _Round) -> None:
        """Checks that parameters still have the layouts that the gradients in flight have."""
        for index, param in enumerate(self._params):
            layout = self._layouts[index]
            if self._retired or layout.is_that_of(param):
                continue
            self._drop(current)
            raise RuntimeError(
                f"fastddp: rank {self._rank}: parameter '{self._names[index]}' had shape"
                f" {list(layout.shape)} and dtype {layout.dtype} in backward, and has"
                f" {list(param.shape)} and {param.dtype} now that its gradient is to be written;"
                " call finalize_backward() before the model is changed. This backward's gradients"
                " are dropped"
            )

    def unused(self) -> list[str]:
        return self._unused

    def error(self) -> str:
        return self._error

    def used_by(self) -> list[int]:
        if self._round is not None:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: which parameters were used is known when the backward"
                " that is under way is over, and finalized"
            )
        if self._stats.rounds == 0 or not self._installed:
            return [self._group().size()] * len(self._params)
        used = [0] * len(self._params)
        for index, bucket in enumerate(self._plan.buckets):
            memory = self._memory.get(index)
            flags = self._left_flags[index] if memory is None else memory.flags
            for slot, flag in zip(bucket.slots, flags.tolist(), strict=True):
                used[slot.param] = int(flag)
        for index in range(self._num_dense, len(self._params)):
            used[index] = int(self._places[index].flag.item())
        return used

    def close(self) -> None:
        self._closed = True
        self._after_round = None
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._nodes = [None] * len(self._params)

    def __del__(self) -> None:
        self._order_in_group.end(id(self))
        self._hook = None  # its buffers are views, which hold what they are views of
        loose = [] if self._loose is None else [self._loose]
        settle(memory.loan for memory in (*self._memory.values(), *loose))

    def stats(self) -> RoundStats:
        return self._stats

    def plan(self) -> BucketPlan:
        return self._plan

    # ---- called by autograd ----------------------------------------------------------------------

    @torch.no_grad()
    @_noting_errors
    def _on_backward(self) -> None:
        is_between = self._phase is _Phase.BETWEEN
        if self._closed or self._phase is _Phase.FILLING or (is_between and not self.sync):
            return
        if not self._accumulates():
            return
        if not is_between:
            self._refuse_backward(f"backward has reached an output of {self._title}")
        if self._retired or any(param.requires_grad for param in self._params):
            self._begin_round()
            self._queue_end()

    def _refuse_backward(self, what: str) -> NoReturn:
        if self._phase is _Phase.IN_FLIGHT:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: {what} while the gradients of the backward before are"
                " in flight; call finalize_backward() before the next backward"
            )
        raise RuntimeError(
            f"fastddp: rank {self._rank}: {what} after finalize_backward() was called in the same"
            " backward; call it from where all of the model's gradients are there, or after"
            " backward"
        )

    @torch.no_grad()
    @_noting_errors
    def _on_gradient(self, index: int) -> None:
        if self._phase is not _Phase.FILLING:
            if self._phase is not _Phase.BETWEEN:
                self._refuse_backward(f"parameter '{self._names[index]}' got a gradient")
            if not self.sync:
                grad = self._params[index].grad
                if grad is None:  # a hook of the user's has taken it
                    self._accumulated.pop(index, None)
                    return
                left = torch._C._WeakTensorRef(grad)  # type: ignore[attr-defined]
                self._accumulated[index] = grad._cdata, left
                return
            self._begin_round()
            self._queue_end()
        if not self._retired:
            assert self._round is not None
            self._take(self._round, index)

    @torch.no_grad()
    @_noting_errors
    def _end_backward(self, ok: bool) -> None:
        current = self._round
        if self._phase is _Phase.FINALIZED:
            # What came after the hook that finalized has autograd's caller wait for its stream.
            self._phase = _Phase.BETWEEN
        elif current is None:
            return
        elif not ok:
            self._abandon_round()
        elif current.is_manual:
            self._leave_in_flight(current)
        else:
            self._finish_round()

    def _leave_in_flight(self, current: _Round) -> None:
        try:
            self._launch_rest(current, waits=False)
        except BaseException:
            self._drop(current)
            raise
        self._phase = _Phase.IN_FLIGHT

    def _finish_round(self, then: _Phase = _Phase.BETWEEN) -> None:
        """Writes the round's gradients to ``.grad``, once they are reduced."""
        current = self._round
        assert current is not None
        start = time.perf_counter()
        try:
            with profiled("fastddp.reducer::finish_round"):
                if self._phase is _Phase.FILLING:
                    self._launch_rest(current, waits=True)
                for launch in range(len(current.waits)):
                    self._wait_for(current, launch)
                    self._cast_back(launch)
            end = time.perf_counter()
        except BaseException:
            self._drop(current, then)
            raise
        self._round, self._phase = None, then
        has_changed = self._read_marks()
        self._hand_out(current)
        if self._lazy:
            self._leave_buckets(current)
        wait_us = (end - start) * 1e6
        self._stats = replace(
            self._stats,
            rounds=self._stats.rounds + 1,
            wait_us_last=wait_us,
            wait_us_total=self._stats.wait_us_total + wait_us,
            overlaps=current.is_early,
            began_ns=current.began_ns,
            backward_us_last=current.backward_us,
            comm_us_last=(end - (current.launched or end)) * 1e6,
        )
        self._note_unused(current)
        if not current.is_shadow:
            self._schedule.add(current.is_early, (time.perf_counter() - current.begin) * 1e6)
        if self._on_news is not None and (has_changed or self._is_empty(current)):
            self._on_news(News.CHANGED if has_changed else News.EMPTY)
        if current.error is not None:
            raise current.error
        if has_changed:
            return  # what comes after a round comes after that of the next reducer
        if self._after_round is not None:
            self._after_round()

    def _launch_rest(self, current: _Round, waits: bool) -> None:
        current.backward_us = (time.perf_counter() - current.begin) * 1e6
        self._flush(current, waits)

    def _abandon_round(self) -> None:
        current = self._round
        assert current is not None
        # The backward's own exception is on its way to the user and says more than one of these.
        # Autograd's thread, with no node running, is on the default stream, which nothing orders
        # behind the round before.
        try:
            with contextlib.suppress(Exception), current.stream or contextlib.nullcontext():
                self._flush(current, waits=False)
                self._left_news = _LeftNews(list(current.waits), self._marked())
        finally:
            self._drop(current)

    def _drop(self, current: _Round, then: _Phase = _Phase.BETWEEN) -> None:
        """Ends a round whose collectives may still write to the buckets: the next gets its own.

        On a GPU memory is free for others as soon as it is dropped here, so it is held until then;
        on the CPU the transport holds it.
        """
        if has_streams(self._device):
            self._abandoned += current.waits
        self._installed = False
        self._order_in_group.end(id(self))
        self._round, self._phase = None, then

    def _accumulates(self) -> bool:
        """Returns whether the current backward is one that fills ``.grad``.

        ``autograd.grad()`` and ``backward(inputs=...)`` are not, and need not involve the other
        ranks. They pass by the leaves that they were not asked for; so one of our parameters below
        tells. Where there is none, all leaves must be filled. A distributed backward, which runs
        nodes without saying which, fills a context; its first gradient begins the round.
        """
        ours = set(self._nodes)
        current = torch._C._current_autograd_node()
        if current is None:
            return False
        todo: list[Node | None] = [current]
        seen: set[Node | None] = {None}
        others: list[Node] = []
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in ours:
                return _will_run(node)
            if hasattr(node, "variable"):
                others.append(node)
            todo += [below for below, _ in node.next_functions]
        return all(_will_run(node) for node in others)

    # ---- one round -------------------------------------------------------------------------------

    @property
    def _scale(self) -> float:
        return 1.0 if self._hook is not None else 1.0 / self._divisor

    def _begin_round(self, *, is_shadow: bool = False, takes_all: bool = False) -> None:
        refuse_compiled_autograd()  # or gradients get lost without a word
        # What waits for the host, or allocates, has no place in a graph. All ranks capture alike,
        # so agreements are put off on all of them.
        captures = is_capturing(self._device)
        if not captures:
            if not is_shadow and not takes_all and self.read_left_news():
                self.leave_news()
                raise RuntimeError(
                    f"fastddp: rank {self._rank}: {self._title} has changed on a rank, and the"
                    " others wait for this one to compare theirs, since its latest backward has"
                    " raised; run a forward in grad mode before the next backward"
                )
            if self._take_late_marks(waits=False) and self._on_news is not None:
                self._on_news(News.CHANGED_BEFORE)
            self._await_agreements()
        elif not self._installed or self._order is not None:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: a graph is being captured in one of the first two"
                " synchronised backwards of this model, or the first after one that raised; run it"
                " two times before the capture"
            )
        if captures and self._lazy:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: a graph would go on to write to buckets that"
                " lazy_bucket_allocation=True leaves to the script; wrap the model without it"
            )
        self._captured |= captures
        if not self._is_checked and self.is_stale():
            self._announce_change()
        self._is_checked = False
        if not self._installed:
            self._install_plan()
        elif not self._captured:  # a graph goes on to write where it did
            self._leave_what_is_held()
        self._order_in_group.begin(id(self))
        self._phase = _Phase.FILLING
        is_manual = self.manual and not is_shadow and not takes_all
        self._round = _Round(
            is_shadow,
            takes_all,
            missing=[len(bucket.slots) for bucket in self._plan.buckets],
            is_manual=is_manual,
            is_early=self._schedule.begin() or not self._may_launch_late or is_manual,
            is_captured=captures,
            touched=[Touched() for _ in range(len(self._plan.buckets) + 1)],
            stream=home_of(self._device),
        )
        self.began_ns = self._round.began_ns

    def _await_agreements(self) -> None:
        if self._order is not None:
            what = "the broadcast of the order in which gradients arrive"
            order, self._order = self._agreed(*self._order, what), None
            self._replan(order)
        if self._timing is not None:
            what = "the all-reduce of the times of rounds"
            times, self._timing = self._agreed(*self._timing, what), None
            self._schedule.decide(*times)

    def _agreed(self, tensor: torch.Tensor, work: Work, what: str) -> list[Any]:
        try:
            work.wait()
        except RuntimeError as error:
            raise torch.distributed.DistBackendError(
                f"fastddp: rank {self._rank}: {what} failed: {error}"
            ) from error
        return tensor.tolist()

    @property
    def _may_launch_late(self) -> bool:
        return self._runs_inline and self._hook is None

    def _queue_end(self) -> None:
        at_end_of_backward(self._end_backward)

    def _install_plan(self) -> None:
        abandoned, self._abandoned = self._abandoned, []
        for wait in abandoned:
            with contextlib.suppress(RuntimeError):  # of a backward that raised anyway
                wait()
        drain_current_stream(self._device)  # whatever stream the old buckets were used on
        if self._captured:  # a graph goes on to write to its own
            self._of_graphs += self._memory.values()
            if self._loose is not None:
                self._of_graphs.append(self._loose)
            self._captured = False
        self._sent_marks.clear()
        self._places.clear()  # frees the old buckets before the new are allocated
        self._memory.clear()
        self._loose = None
        num_sparse = len(self._params) - self._num_dense
        num_loose = num_sparse + (0 if self._hook is None else self._num_dense)
        if num_loose:
            loose = self._allocate(num_loose + NUM_MARKS, torch.float32)
            flags, marks = loose.split([num_loose, NUM_MARKS])
            self._loose = self._lend(self._launch_of_flags, loose, loose, loose, flags, marks)
        self._bucket_of = {
            slot.param: index
            for index, bucket in enumerate(self._plan.buckets)
            for slot in bucket.slots
        }
        if not self._lazy:
            self._memory |= {n: self._install_bucket(n) for n in range(len(self._plan.buckets))}
        for index in range(self._num_dense, len(self._params)):
            assert self._loose is not None
            flag = self._loose.flags[index - len(self._params)]  # the last ones
            empty = _empty_sparse(self._params[index])
            self._places[index] = _Place(-1, empty, empty, flag)
        if self._loose is not None:  # once more, for the buckets' flags are views of it
            self._loose = replace(self._loose, loan=Loan(self._loose.wire))
        drain_current_stream(self._device)  # other streams may be the first to write to the buckets
        self._installed = True
        self._stats = replace(
            self._stats,
            bytes_per_round=sum(
                bucket.numel * self._wire_dtype(bucket.dtype).itemsize
                for bucket in self._plan.buckets
            ),
            num_buckets=len(self._plan.buckets),
        )

    def _install_lazily(self, current: _Round, index: int) -> None:
        """Allocates a bucket in the midst of a round, unless it is there."""
        if index not in self._memory:
            self._memory[index] = self._install_bucket(index)
            current.touched[index].by_current(self._device)

    def _leave_buckets(self, current: _Round) -> None:
        """Leaves the buckets to the script: no reference from in here keeps them alive."""
        current.waits.clear()
        if self._hook is not None:
            self._hook.let_go()
        settle(memory.loan for memory in self._memory.values())
        for index, memory in self._memory.items():
            self._left_flags[index] = memory.flags.clone()
        for index in self._bucket_of:
            del self._places[index]
        for index in range(self._num_dense, len(self._params)):
            self._places[index].slot = _empty_sparse(self._params[index])
        self._memory.clear()

    def _install_bucket(self, index: int) -> _Memory:
        bucket = self._plan.buckets[index]
        num_slots = len(bucket.slots)
        flat = wire = self._allocate(bucket.numel, self._wire_dtype(bucket.dtype))
        if wire.dtype != bucket.dtype:
            flat = torch.zeros_like(wire, dtype=bucket.dtype)
        marks = None
        if self._hook is None:
            flags = wire.narrow(0, bucket.flags_offset, num_slots)
            marks = wire.narrow(0, bucket.flags_offset + num_slots, NUM_MARKS)
        else:
            assert self._loose is not None
            begin = sum(len(before.slots) for before in self._plan.buckets[:index])
            flags = self._loose.flags.narrow(0, begin, num_slots)
        for nth, slot in enumerate(bucket.slots):
            view = _make_slot(flat, slot, self._layouts[slot.param], self._hook is not None)
            sent = wire.as_strided(_real(view).shape, _real(view).stride(), slot.offset)
            self._places[slot.param] = _Place(index, view, sent, flags[nth])
        gradients = flat.narrow(0, 0, bucket.flags_offset)
        # Last: views refer to the tensor too.
        return self._lend(index, flat, wire, gradients, flags, marks)

    def _lend(
        self,
        launch: int,
        flat: torch.Tensor,
        wire: torch.Tensor,
        gradients: torch.Tensor,
        flags: torch.Tensor,
        marks: torch.Tensor | None,
    ) -> _Memory:
        sent_marks = self._sent_marks.get(launch)
        if sent_marks is None:
            values = marks_of(label_of(self._owner, launch), self._retired)
            sent_marks = torch.tensor(values, dtype=wire.dtype, device=wire.device)
            self._sent_marks[launch] = sent_marks
        loan, storage = Loan(wire), flat.untyped_storage()
        return _Memory(
            flat,
            wire,
            gradients,
            flags,
            marks,
            sent_marks,
            loan,
            storage,
            num_references=_num_references(storage),
            home=home_of(self._device),
        )

    def _leave_what_is_held(self) -> None:
        """Gives a bucket new memory if the script still refers to gradients in the old.

        Those that lie in ``.grad`` as they were handed out are the round's own to write over; not
        if the reducer is retired, for then the next one needs them.
        """
        is_any_new = False
        for index, memory in self._memory.items():
            num_outside = _num_references(memory.storage) - memory.num_references
            if num_outside == 0:
                continue
            slots = self._plan.buckets[index].slots
            in_place = sum(
                not self._retired
                and _is_alias(self._params[slot.param].grad, self._places[slot.param].slot)
                for slot in slots
            )
            if num_outside > in_place:
                self._memory[index] = self._install_bucket(index)
                is_any_new = True
        if is_any_new:
            drain_current_stream(self._device)  # other streams may be the first to write to them

    def _take(self, current: _Round, index: int) -> None:
        param = self._params[index]
        grad = param.grad
        if grad is None:
            return
        if self._lazy and index < self._num_dense:
            self._install_lazily(current, self._bucket_of[index])
        place = self._places[index]
        if index < self._num_dense and _is_as_handed_out(grad, place.slot):
            current.aliases[index] = grad
        taken = current.taken[index]
        touched = current.touched[place.bucket]
        if index >= self._num_dense:
            touched.by_current_after_all(self._device)
            scaled = _scale_sparse(grad, self._scale)
            place.slot = scaled if taken == 0 else place.slot + scaled
            current.taken[index] += 1
            param.grad = None
            return
        if grad.is_sparse:
            raise TypeError(
                f"fastddp: rank {self._rank}: parameter '{self._names[index]}' got a sparse"
                " gradient, but belongs to no torch.nn.Embedding or EmbeddingBag with sparse=True,"
                " which is what is looked for when a model is wrapped"
            )
        grad = self._fitting(index, grad)
        if taken == 0:
            if self._lazy:  # behind the stream that has allocated it
                touched.by_current_after_all(self._device)
            else:
                touched.by_current(self._device)
            write(place.sent, _real(_resolved(grad)), self._scale)
            current.arrival.append(index)
        elif current.next_bucket <= place.bucket:
            touched.by_current_after_all(self._device)
            place.sent.add_(widened(_real(_resolved(grad)), place.sent).mul(self._scale))
        else:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: parameter '{self._names[index]}' got gradient number"
                f" {taken + 1} of one backward after {taken} had been sent, as many as it ever got"
                " before. This happens when re-entrant activation checkpoints begin to share a"
                " parameter in the midst of training; use checkpoint(..., use_reentrant=False)"
            )
        current.taken[index] += 1
        if current.taken[index] == self._expected[index]:
            current.missing[place.bucket] -= 1
        param.grad = None
        # The first round launches nothing before its end: how many gradients a parameter gets in
        # one backward (re-entrant checkpoints that share it bring several) is only known then. When
        # to launch is this rank's own decision, so it is made by what this rank has seen.
        if not self._counts_are_learned or not current.is_early:
            return
        while (
            current.next_bucket < len(current.missing)
            and current.missing[current.next_bucket] == 0
            and self._order_in_group.may_launch(id(self))
        ):
            self._launch(current)
        if self._is_all_launched(current):
            self._order_in_group.end(id(self))

    def _is_all_launched(self, current: _Round) -> bool:
        """Returns whether the round has launched its buckets, and has nothing to follow them."""
        if current.next_bucket < len(current.missing):
            return False
        return self._loose is None and self._order_is_learned and not self._is_timing_due

    @property
    def _is_timing_due(self) -> bool:
        return self._may_launch_late and self._schedule.is_due

    def _fitting(self, index: int, grad: torch.Tensor) -> torch.Tensor:
        """Returns the gradient in its parameter's shape, whatever the script has made of it.

        Where it lies in the bucket, it is exactly in the slot or, when returned, no longer there.
        """
        shape, slot = self._layouts[index].shape, self._places[index].slot
        if grad.shape != shape:
            if grad.numel() != shape.numel():
                raise RuntimeError(
                    f"fastddp: rank {self._rank}: parameter '{self._names[index]}' has shape"
                    f" {list(shape)}, but its .grad has shape {list(grad.shape)}; set .grad to"
                    " None or to a tensor of the parameter's shape before backward"
                )
            grad = grad.reshape(shape)
        in_slot = grad.data_ptr() == slot.data_ptr() and grad.stride() == slot.stride()
        return grad if in_slot or not _shares_storage(grad, slot) else grad.clone()

    def _launch(self, current: _Round, waits: bool = False) -> None:
        """Fills in what this rank has no gradient for, then sends the next bucket on its way."""
        current.launched = current.launched or time.perf_counter()
        index = current.next_bucket
        if self._lazy:
            self._install_lazily(current, index)
        bucket, memory = self._plan.buckets[index], self._memory[index]
        with profiled("fastddp.reducer::fill_bucket"):
            current.touched[index].by_current_after_all(self._device)
            memory.flags.fill_(1)
            if memory.marks is not None:
                memory.marks.copy_(memory.sent_marks)
            for slot in bucket.slots:
                if slot.param not in current.taken:
                    self._add_bystander(current, slot.param)
        current.next_bucket += 1
        if self._hook is None:
            current.waits.append(self._start_all_reduce(memory.wire, index, waits))
            return
        current.waits.append(
            self._start_hook(
                index,
                memory.gradients,
                [slot.param for slot in bucket.slots],
                [slot.offset for slot in bucket.slots],
            )
        )

    def _launch_sparse(self, current: _Round, index: int) -> None:
        current.launched = current.launched or time.perf_counter()
        place = self._places[index]
        current.touched[place.bucket].by_current_after_all(self._device)
        place.flag.fill_(1)
        if index not in current.taken:
            self._add_bystander(current, index)
        nth = len(self._plan.buckets) + index - self._num_dense
        if self._hook is None:
            current.waits.append(self._start_all_reduce(place.slot, nth))
        else:
            current.waits.append(self._start_hook(nth, place.slot, [index], [0]))

    def _start_all_reduce(self, tensor: torch.Tensor, launch: int, waits: bool = False) -> Wait:
        options = AllreduceOptions()
        options.asyncOp = not waits
        try:
            with without_context(), labelled(self._owner, launch + 1):
                work = self._group().allreduce([tensor], options)
        except torch.distributed.DistBackendError as error:  # it has been waited for already
            return partial(_raise, error)

        def wait() -> None:
            work.wait()

        return wait

    def _start_hook(
        self, index: int, buffer: torch.Tensor, params: Sequence[int], offsets: Sequence[int]
    ) -> Wait:
        assert self._hook is not None
        count = len(self._plan.buckets) + len(self._params) - self._num_dense
        owners = [self._params[param] for param in params]
        with labelled(self._owner, index + 1):
            return self._hook.start(GradBucket(index, count, buffer, owners, offsets))

    def _add_bystander(self, current: _Round, index: int) -> None:
        """Puts into the slot what this rank has, which did not come from the round's backward."""
        param, place = self._params[index], self._places[index]
        is_dense = index < self._num_dense
        if self._retired:  # what is in `.grad` is for the reducer that comes after this one
            if is_dense:
                place.sent.zero_()
            else:
                place.slot = _empty_sparse(place.slot)
            place.flag.zero_()
            return
        grad, param.grad = param.grad, None
        old = grad
        accumulated = not current.is_shadow and (
            self._is_accumulated(index, grad) or (current.takes_all and grad is not None)
        )
        if is_dense and grad is not None and _is_as_handed_out(grad, place.slot):
            current.aliases[index] = grad
        if is_dense and grad is not None:
            try:
                grad = self._fitting(index, grad.to_dense() if grad.is_sparse else grad)
            except RuntimeError as error:  # raised at the end: the other ranks wait for the round
                current.error = current.error or error
                grad, accumulated = None, False
        # The reduction overwrites the slot. If no rank has a new gradient the old must come back
        # bit for bit.
        if is_dense and grad is not None and not accumulated and _shares_storage(grad, place.slot):
            old = grad.clone()
        if grad is None or current.is_shadow:
            if is_dense:
                place.sent.zero_()
            else:
                place.slot = _empty_sparse(param)
        elif is_dense:
            write(place.sent, _real(_resolved(grad)), self._scale)
            if current.stream is not None:  # whatever stream it is from
                grad.record_stream(torch.accelerator.current_stream(self._device))
        else:
            place.slot = _scale_sparse(grad, self._scale)
        if accumulated:
            return  # what unsynchronised backwards left is this one's too
        place.flag.zero_()
        current.bystanders.append(_Bystander(index, old))

    def _flush(self, current: _Round, waits: bool) -> None:
        while current.next_bucket < len(current.missing):
            self._launch(current, waits and self._may_launch_late)
        for index in range(self._num_dense, len(self._params)):
            self._launch_sparse(current, index)
        if self._hook is not None:  # its callbacks may communicate; see HookRunner
            for wait in current.waits:
                wait()
            current.waits.clear()
        if self._loose is not None:
            for touched in current.touched:
                touched.by_current_after_all(self._device)
            assert self._loose.marks is not None
            self._loose.marks.copy_(self._loose.sent_marks)
            current.waits.append(self._start_all_reduce(self._loose.flat, self._launch_of_flags))
        if not self._order_is_learned and not current.takes_all:
            self._agree_on_order(current)
        if self._is_timing_due:
            self._agree_on_schedule()
        self._order_in_group.end(id(self))

    def _is_accumulated(self, index: int, grad: torch.Tensor | None) -> bool:
        address, left = self._accumulated.get(index, (0, None))
        if grad is None or left is None:
            return False
        return not left.expired() and grad._cdata == address

    def _agree_on_order(self, current: _Round) -> None:
        """Starts to send rank 0's arrival order to all; the next round begins with its plan."""
        slots = (slot.param for bucket in self._plan.buckets for slot in bucket.slots)
        rest = [index for index in slots if index not in current.taken]
        order = torch.tensor(current.arrival + rest, device=self._device)
        with without_context(), labelled(self._owner):
            self._order = order, self._group().broadcast([order])
        self._order_is_learned = True

    def _agree_on_schedule(self) -> None:
        """Starts to add up the ranks' times; the next round begins with what they decide."""
        best = [self._schedule.early_us, self._schedule.late_us]
        times = torch.tensor(best, dtype=torch.float64)
        with without_context(), labelled(self._owner):
            self._timing = times, self._group().allreduce([times])

    def _wait_for(self, current: _Round, launch: int) -> None:
        try:
            current.waits[launch]()
        except RuntimeError as error:
            raise torch.distributed.DistBackendError(
                f"fastddp: rank {self._rank}: the all-reduce of {self._describe(launch)} failed:"
                f" {error}"
            ) from error

    def _cast_back(self, launch: int) -> None:
        """Brings what was reduced in another dtype to where gradients are."""
        if self._hook is None and launch < len(self._plan.buckets):
            memory = self._memory[launch]
            if memory.wire is not memory.flat:
                memory.flat.copy_(memory.wire)

    def _read_marks(self) -> bool:
        """Returns whether the model of any rank has changed.

        Raises:
            RuntimeError: if the ranks have added up different buckets.
        """
        marked = self._marked()
        if not has_streams(self._device):
            return self._check_marks((launch, marks.tolist()) for launch, marks in marked)
        if is_capturing(self._device):
            return False
        # The host does not wait for a device unless this rank has news itself: the next round, or
        # one after it, finds the marks on the host.
        late = LateCopy(torch.stack([marks for _, marks in marked]))
        self._late_marks.append((late, [launch for launch, _ in marked]))
        return self._retired and self._take_late_marks(waits=True)

    def _take_late_marks(self, *, waits: bool) -> bool:
        """Returns what :meth:`_read_marks` could not know on a device yet."""
        has_changed = False
        while self._late_marks and (waits or self._late_marks[0][0].is_there()):
            late, launches = self._late_marks.popleft()
            if waits:
                late.wait()
            has_changed |= self._check_marks(zip(launches, late.copy.tolist(), strict=True))
        return has_changed

    def _marked(self) -> _Marked:
        """Returns the marks of the round's collectives, in the order of launching."""
        loose = [] if self._loose is None else [(self._launch_of_flags, self._loose)]
        return [
            (launch, memory.marks)
            for launch, memory in (*sorted(self._memory.items()), *loose)
            if memory.marks is not None
        ]

    def _check_marks(self, marked: Iterable[tuple[int, list[float]]]) -> bool:
        has_changed = False
        for launch, values in marked:
            if is_mixed(label_of(self._owner, launch), values):
                raise RuntimeError(self._explain_mixture(launch))
            has_changed |= any_changed(values)
        return has_changed

    @property
    def _launch_of_flags(self) -> int:
        return len(self._plan.buckets) + len(self._params) - self._num_dense

    def _explain_mixture(self, launch: int) -> str:
        return (
            f"fastddp: rank {self._rank}: {self._describe(launch)} of {self._title} was added up"
            " with a bucket of another model on the same group"
            f" ({self._order_in_group.others(self._owner) or 'none that this rank has'}), so these"
            " gradients are wrong; run the models' forwards in the same order on all ranks"
        )

    def _is_empty(self, current: _Round) -> bool:
        """Returns whether no rank had a gradient for any parameter, where the host knows it."""
        if current.taken or current.takes_all or self._retired or has_streams(self._device):
            return False
        return len(current.bystanders) == len(self._params) and not any(self._used)

    def _hand_out(self, current: _Round) -> None:
        self._accumulated.clear()
        if self._retired:
            return
        for index, param in enumerate(self._params):
            self._expected[index] = max(self._expected[index], current.taken[index])
            slot = self._places[index].slot
            if index < self._num_dense:
                alias = current.aliases.get(index)
                param.grad = slot.data if alias is None else alias
            else:
                param.grad = slot
        self._counts_are_learned |= not current.is_shadow and not current.takes_all
        self._read_flags(current)
        for bystander in current.bystanders:
            if self._used[bystander.param]:
                continue
            _put_back(self._params[bystander.param], bystander.grad)
            if self._stats.rounds == 0:
                self._unused.append(self._names[bystander.param])
        for memory in self._memory.values():  # `.grad` is going to be used here
            keep_for_current((memory.flat, memory.wire), memory.home)

    def _note_unused(self, current: _Round) -> None:
        """Compares what this rank did not use with the round before."""
        if current.is_shadow or current.takes_all:
            return
        unused = sorted(bystander.param for bystander in current.bystanders)
        if unused != self._unused_last:
            is_first = self._unused_last is None
            self._unused_last = unused
            self._stats = replace(
                self._stats,
                unused_bytes_last=sum(self._params[index].nbytes for index in unused),
                is_static=self._stats.is_static and is_first,
            )

    def _read_flags(self, current: _Round) -> None:
        """Reads, of the bystanders, whether any rank had a gradient; from a GPU all at once.

        This is where the host waits, on a rank that has bystanders. A graph cannot: it goes by what
        was read last.
        """
        if not current.bystanders or is_capturing(self._device):
            return
        params = [bystander.param for bystander in current.bystanders]
        flags = torch.stack([self._places[param].flag for param in params])
        for param, flag in zip(params, flags.tolist(), strict=True):
            self._used[param] = flag != 0

    # ---- memory and names ------------------------------------------------------------------------

    def _replan(self, order: Sequence[int]) -> None:
        align_bytes = SLOT_ALIGN_BYTES if self._comm_dtype is None else CAST_ALIGN_BYTES
        if self._hook is not None:
            align_bytes = PACKED_ALIGN_BYTES
        plan = plan_buckets(self._specs, order, self._caps_bytes, align_bytes)
        self._schedule = Schedule()  # here, where all ranks are in the same round
        if plan != self._plan:
            self._plan = plan
            self._installed = False

    def _allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns zeroed memory, so that the padding between slots sums to zero for ever."""
        device = self._device
        group = self._group()
        try:
            backend = group._get_backend(device)
            if backend.supports_tensor_alloc(device):
                return backend.allocate_tensor(numel, dtype=dtype, device=device).zero_()
        except torch.OutOfMemoryError as error:
            warnings.warn(
                f"fastddp: rank {self._rank}: gradients are not in memory that the ranks share, so"
                f" reducing them takes several times as long: {error}",
                stacklevel=2,
            )
        except (RuntimeError, ValueError):  # not ready, as NCCL before its first collective
            pass
        return torch.zeros(numel, dtype=dtype, device=device)

    def _wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self._hook is not None or self._comm_dtype is None or dtype == torch.float64:
            return dtype
        return self._comm_dtype

    def _group(self) -> ProcessGroup:
        group = self._group_ref()
        if group is None:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: the process group of this model was destroyed before"
                " its backward; call destroy_process_group() after the last step"
            )
        return group

    def _describe(self, launch: int) -> str:
        if self._hook is not None:
            return "the flags of used parameters"
        if launch >= len(self._plan.buckets):
            param = self._num_dense + launch - len(self._plan.buckets)
            if param < len(self._params):
                return f"the sparse gradient of '{self._names[param]}'"
            return "the flags of used parameters"
        slots = self._plan.buckets[launch].slots
        names = f"'{self._names[slots[0].param]}'"
        if len(slots) > 1:
            names += f" to '{self._names[slots[-1].param]}'"
        return f"bucket {launch + 1} of {len(self._plan.buckets)} ({names})"


def _accumulator(param: torch.nn.Parameter) -> Node:
    trains = param.requires_grad
    with torch._C.DisableTorchFunctionSubclass():  # else a subclass gets a node of a view of it
        node = get_gradient_edge(param.requires_grad_(True)).node  # else there is none
    param.requires_grad_(trains)
    return node


def _will_run(leaf: Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # autograd.grad() was asked for this very leaf
        return False


def _gradient_hook(reducer: weakref.ref[PythonReducer], index: int) -> Callable[..., None]:
    @untraced
    def hook(_: object, gradients: tuple[torch.Tensor | None, ...]) -> None:
        # A node runs without a gradient too, when a custom backward returns none.
        alive = reducer() if gradients[0] is not None else None
        if alive is not None:
            alive._on_gradient(index)

    return hook


def _runs_inline(group: ProcessGroup, params: Sequence[torch.Tensor]) -> bool:
    """Returns whether it is our own backend, which then has the launching thread do the work."""
    if not params or params[0].device.type != "cpu":
        return False
    try:
        return bool(group._get_backend(params[0].device).name() == "shm")
    except RuntimeError:  # a group of the user's making, which has no backends
        return False


def _raise(error: BaseException) -> NoReturn:
    raise error


@dataclass(slots=True)
class _Layout:
    """A parameter as it was when it was hooked."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_dense: bool
    data_ptr: int

    @classmethod
    def of(cls, param: torch.Tensor) -> _Layout:
        dense = torch.ops.aten.is_non_overlapping_and_dense(param)
        stride = tuple(param.stride())
        return cls(param.shape, stride, param.dtype, param.device, dense, param.data_ptr())

    def is_that_of(self, param: torch.Tensor) -> bool:
        return (
            param.dtype is self.dtype
            and param.shape == self.shape
            and param.stride() == self.stride
            and param.device == self.device
        )

    def has_moved(self, param: torch.nn.Parameter, node: Node) -> bool:
        """Returns whether autograd has another node for the parameter than the hooked one.

        It makes one where the parameter gets other memory by ``set_``, but not by ``.data =``.
        """
        if param.data_ptr() == self.data_ptr:
            return False
        if _accumulator(param) is not node:
            return True
        self.data_ptr = param.data_ptr()
        return False


def _make_slot(flat: torch.Tensor, slot: Slot, like: _Layout, contiguous: bool) -> torch.Tensor:
    """Returns the slot in the parameter's shape, and with its strides unless ``contiguous``.

    The strides are those that the ranks have compared: the parameter's may be others by now, on
    this rank alone. The slot shares the bucket's storage but is not a view to autograd, so
    ``grad.detach_()`` works.
    """
    dense = like.is_dense and not contiguous
    stride = like.stride if dense else torch.empty(like.shape, device="meta").stride()
    offset = slot.offset // 2 if like.dtype.is_complex else slot.offset
    storage = torch.empty(0, dtype=like.dtype, device=like.device)
    return storage.set_(flat.untyped_storage(), offset, like.shape, stride)


def _num_references(storage: torch.UntypedStorage) -> int:
    """Returns how many tensors and other objects refer to this memory."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def _put_back(param: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
    """Makes it the parameter's gradient again, whatever shape and dtype the script has given it."""
    try:
        param.grad = grad
    except RuntimeError:  # as torch says to such a one
        assert grad is not None
        param.grad = torch.empty_like(param)
        param.grad.data = grad


def _is_alias(grad: torch.Tensor | None, slot: torch.Tensor) -> bool:
    """Returns whether the gradient begins where the slot does, in the same memory."""
    if grad is None or grad.layout != torch.strided or grad.data_ptr() != slot.data_ptr():
        return False
    return slot.numel() > 0 or _shares_storage(grad, slot)


def _is_as_handed_out(grad: torch.Tensor, slot: torch.Tensor) -> bool:
    """Returns whether the script has left the alias of a slot as it got it."""
    return (
        _is_alias(grad, slot)
        and grad.shape == slot.shape
        and grad.stride() == slot.stride()
        and grad.dtype == slot.dtype
        and not grad.requires_grad
        and not grad.is_conj()
        and not grad.is_neg()
    )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _resolved(grad: torch.Tensor) -> torch.Tensor:
    """Returns the gradient with its values in memory, not with a lazy conjugation or negation."""
    return grad.resolve_conj().resolve_neg()


def _scale_sparse(grad: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns ``grad * scale`` with one dimension of indices, like an embedding's."""
    return torch.mul(grad if grad.is_sparse else grad.to_sparse(1), scale)


def _empty_sparse(param: torch.Tensor) -> torch.Tensor:
    indices = torch.empty(1, 0, dtype=torch.long, device=param.device)
    values = torch.empty(0, *param.shape[1:], dtype=param.dtype, device=param.device)
    return torch.sparse_coo_tensor(indices, values, param.shape)


def _shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
