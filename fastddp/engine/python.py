"""The Python engine: the reducer's specification, in plain torch.

One synchronised backward is a *round*. Its life:

* it begins: ``_begin_round`` installs the plan if a new one is due and asks autograd to call back
  at the end of this backward.
* each gradient: ``_take`` scales it into its place, empties ``.grad`` and launches the buckets that
  are full, in plan order.
* end of backward: ``_finish_round`` launches what is left, waits, and makes each ``.grad`` the
  reduced slot.
* backward raised: ``_abandon_round`` launches what is left and waits for nothing but hooks.

A round begins when backward reaches an output of forward, or at the first gradient if there is no
such output. The former is the same on every rank, whatever parameters it goes on to reach, and is
outside of any re-entrant backward.

Every rank launches every bucket in every round, also those it has no gradient for, and then every
sparse gradient, so ranks stay in step when they use different parameters or when one of them
raises. ``.grad`` is empty while its bucket is in flight, so nothing but the collective can touch a
launched bucket.

On a GPU whatever touches a bucket waits for the streams that have touched it before, by events; the
host waits for nothing but the flags of parameters that this rank has no gradient for. At the end of
a round the stream that called backward is behind all of it.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed import ProcessGroup, Work
from torch.distributed.distributed_c10d import AllreduceOptions

from fastddp.backward import at_end_of_backward, on_backward, wait_until
from fastddp.collectives import Loan, settle, without_context
from fastddp.compiler import refuse_compiled_autograd, untraced
from fastddp.engine.schedule import Schedule
from fastddp.flat import widened, write
from fastddp.hooks import BucketRunner, GradBucket, Wait
from fastddp.plan import (
    CAST_ALIGN_BYTES,
    PACKED_ALIGN_BYTES,
    SLOT_ALIGN_BYTES,
    BucketPlan,
    ParamSpec,
    Slot,
    plan_buckets,
)
from fastddp.streams import (
    Touched,
    drain_current_stream,
    has_streams,
    home_of,
    is_capturing,
    keep_for_current,
)


@dataclass(frozen=True, slots=True)
class RoundStats:
    """See :class:`fastddp.engine.Stats`."""

    rounds: int = 0
    wait_us_total: float = 0.0
    wait_us_last: float = 0.0
    bytes_per_round: int = 0
    num_buckets: int = 0
    overlaps: bool = True


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
    flags: torch.Tensor
    """In its tail, so that they need no collective; or in the loose ones."""
    loan: Loan


@dataclass(frozen=True, slots=True)
class _Bystander:
    """A gradient that the round's own backward did not produce, as it was before the round."""

    param: int
    grad: torch.Tensor | None


@dataclass(slots=True)
class _Round:
    is_shadow: bool
    """Of a round of the other ranks."""
    missing: list[int]
    """By bucket, gradients still to come."""
    is_early: bool
    """Whether buckets are launched as they fill."""
    touched: list[Touched]
    """By bucket; the last is of the sparse gradients."""
    stream: torch.Stream | None
    """That it began on."""
    begin: float = field(default_factory=time.perf_counter)
    next_bucket: int = 0
    taken: Counter[int] = field(default_factory=Counter)
    """By parameter, gradients so far."""
    arrival: list[int] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    """In the order of launching."""
    bystanders: list[_Bystander] = field(default_factory=list)


class PythonReducer:
    """See :class:`fastddp.engine.Reducer`."""

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        num_sparse: int,
        frozen: Sequence[torch.Tensor],
        group: ProcessGroup,
        caps_bytes: Sequence[int],
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        self.sync = True
        self._closed = False
        self._hook: BucketRunner | None = None
        self._loose_flags: _Memory | None = None  # those that travel in no bucket
        self._memory: list[_Memory] = []
        self._installed = False  # whether these two are the plan's
        self._home: torch.Stream | None = None  # that they were allocated on
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
        self._rank = group.rank()
        # Whether a collective that is waited for at once costs no switch of threads.
        self._runs_inline = _runs_inline(group, params)
        self._divisor = float(group.size())
        self._caps_bytes = list(caps_bytes)
        self._after_round: Callable[[], None] | None = None
        # Until the arrival order is known: gradients come back roughly in the reverse order.
        self._plan = BucketPlan(())
        self._replan(list(reversed(range(self._num_dense))))

        self._places: dict[int, _Place] = {}
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
        self._round: _Round | None = None  # until all of it is launched, also if it is abandoned

        # A tensor holds its gradient node weakly: kept here, or the hook would go with the node.
        self._nodes = [_accumulator(param) for param in self._params]
        this = weakref.ref(self)
        self._hooks = [
            node.register_hook(_gradient_hook(this, nth)) for nth, node in enumerate(self._nodes)
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

    def outgrown(self) -> bool:
        return any(param.requires_grad for param in self._frozen)

    def settle(self) -> bool:
        # When a backward on a GPU raises, the thread that autograd ran it in may be the last to let
        # go of it, a moment after the caller got its exception. What the caller launches next would
        # come before the rest of the round, on this rank alone.
        return not has_streams(self._device) or wait_until(lambda: self._round is None)

    @torch.no_grad()
    def shadow(self) -> None:
        self._round = self._begin_round(is_shadow=True)
        self._finish_round()

    def unused(self) -> list[str]:
        return self._unused

    def close(self) -> None:
        self._closed = True
        for hook in self._hooks:
            hook.remove()

    def __del__(self) -> None:
        self._hook = None  # its buffers are views, which hold what they are views of
        loose = [] if self._loose_flags is None else [self._loose_flags]
        settle(memory.loan for memory in (*self._memory, *loose))

    def stats(self) -> RoundStats:
        return self._stats

    def plan(self) -> BucketPlan:
        return self._plan

    # ---- called by autograd ----------------------------------------------------------------------

    @torch.no_grad()
    def _on_backward(self) -> None:
        if self._closed or self._round is not None or not self.sync or not self._accumulates():
            return
        if any(param.requires_grad for param in self._params):
            self._round = self._begin_round()
            self._queue_end()

    @torch.no_grad()
    def _on_gradient(self, index: int) -> None:
        if self._round is None:
            if not self.sync:
                grad = self._params[index].grad
                if grad is None:  # a hook of the user's has taken it
                    self._accumulated.pop(index, None)
                    return
                left = torch._C._WeakTensorRef(grad)  # type: ignore[attr-defined]
                self._accumulated[index] = grad._cdata, left
                return
            self._round = self._begin_round()
            self._queue_end()
        self._take(self._round, index)

    @torch.no_grad()
    def _finish_round(self) -> None:
        current = self._round
        assert current is not None
        try:
            start = time.perf_counter()
            self._flush(current, waits=True)
            for launch in range(len(current.waits)):
                self._wait_for(current, launch)
                self._cast_back(launch)
            wait_us = (time.perf_counter() - start) * 1e6
        except BaseException:
            self._drop(current)
            raise
        self._round = None
        self._hand_out(current)
        self._stats = replace(
            self._stats,
            rounds=self._stats.rounds + 1,
            wait_us_last=wait_us,
            wait_us_total=self._stats.wait_us_total + wait_us,
            overlaps=current.is_early,
        )
        if not current.is_shadow:
            self._schedule.add(current.is_early, (time.perf_counter() - current.begin) * 1e6)
        if self._after_round is not None:
            self._after_round()

    @torch.no_grad()
    def _abandon_round(self) -> None:
        current = self._round
        if current is None:
            return
        # The backward's own exception is on its way to the user and says more than one of these.
        # Autograd's thread, with no node running, is on the default stream, which nothing orders
        # behind the round before.
        try:
            with contextlib.suppress(Exception), current.stream or contextlib.nullcontext():
                self._flush(current, waits=False)
        finally:
            self._drop(current)

    def _drop(self, current: _Round) -> None:
        """Ends a round whose collectives may still write to the buckets: the next gets its own.

        On a GPU memory is free for others as soon as it is dropped here, so it is held until then;
        on the CPU the transport holds it.
        """
        if has_streams(self._device):
            self._abandoned += current.waits
        self._installed = False
        self._round = None

    def _accumulates(self) -> bool:
        """Returns whether the current backward is one that fills ``.grad``.

        ``autograd.grad()`` and ``backward(inputs=...)`` are not, and need not involve the other
        ranks. They pass by the leaves that they were not asked for; so one of our parameters below
        tells. Where there is none, all leaves must be filled.
        """
        ours = set(self._nodes)
        todo: list[Node | None] = [torch._C._current_autograd_node()]
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

    def _begin_round(self, is_shadow: bool = False) -> _Round:
        refuse_compiled_autograd()  # or gradients get lost without a word
        # What waits for the host, or allocates, has no place in a graph. All ranks capture alike,
        # so agreements are put off on all of them.
        captures = is_capturing(self._device)
        if not captures:
            self._await_agreements()
        elif not self._installed or self._order is not None:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: a graph is being captured in one of the first two"
                " synchronised backwards of this model, or the first after one that raised; run it"
                " two times before the capture"
            )
        self._captured |= captures
        if not self._installed:
            self._install_plan()
        return _Round(
            is_shadow,
            missing=[len(bucket.slots) for bucket in self._plan.buckets],
            is_early=self._schedule.begin() or not self._may_launch_late,
            touched=[Touched() for _ in range(len(self._plan.buckets) + 1)],
            stream=home_of(self._device),
        )

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
        at_end_of_backward(lambda ok: self._finish_round() if ok else self._abandon_round())

    def _install_plan(self) -> None:
        abandoned, self._abandoned = self._abandoned, []
        for wait in abandoned:
            with contextlib.suppress(RuntimeError):  # of a backward that raised anyway
                wait()
        drain_current_stream(self._device)  # whatever stream the old buckets were used on
        if self._captured:  # a graph goes on to write to its own
            self._of_graphs += self._memory
            if self._loose_flags is not None:
                self._of_graphs.append(self._loose_flags)
            self._captured = False
        self._places.clear()  # frees the old buckets before the new are allocated
        self._memory.clear()
        num_sparse = len(self._params) - self._num_dense
        num_loose = num_sparse + (0 if self._hook is None else self._num_dense)
        self._loose_flags = None
        loose = torch.empty(0)
        if num_loose:
            loose = self._allocate(num_loose, torch.float32)
        next_flag = 0
        for index, bucket in enumerate(self._plan.buckets):
            flat = wire = self._allocate(bucket.numel, self._wire_dtype(bucket.dtype))
            if wire.dtype != bucket.dtype:
                flat = torch.zeros_like(wire, dtype=bucket.dtype)
            if self._hook is None:
                flags = wire.narrow(0, bucket.flags_offset, len(bucket.slots))
            else:
                flags = loose.narrow(0, next_flag, len(bucket.slots))
                next_flag += len(bucket.slots)
            for nth, slot in enumerate(bucket.slots):
                view = _make_slot(self._params[slot.param], flat, slot, self._hook is not None)
                sent = wire.as_strided(_real(view).shape, _real(view).stride(), slot.offset)
                self._places[slot.param] = _Place(index, view, sent, flags[nth])
            # The loan last: views refer to the tensor too.
            self._memory.append(_Memory(flat, wire, flags, Loan(wire)))
        for index in range(self._num_dense, len(self._params)):
            empty = _empty_sparse(self._params[index])
            self._places[index] = _Place(-1, empty, empty, loose[next_flag])
            next_flag += 1
        if num_loose:
            self._loose_flags = _Memory(loose, loose, loose, Loan(loose))
        self._home = home_of(self._device)
        drain_current_stream(self._device)  # other streams may be the first to write to the buckets
        self._installed = True
        self._stats = replace(
            self._stats,
            bytes_per_round=sum(memory.wire.nbytes for memory in self._memory),
            num_buckets=len(self._memory),
        )

    def _take(self, current: _Round, index: int) -> None:
        param, place = self._params[index], self._places[index]
        grad = param.grad
        if grad is None:
            return
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
        if taken == 0:
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
            current.next_bucket < len(current.missing) and current.missing[current.next_bucket] == 0
        ):
            self._launch(current)

    def _launch(self, current: _Round, waits: bool = False) -> None:
        """Fills in what this rank has no gradient for, then sends the next bucket on its way."""
        index = current.next_bucket
        bucket, memory = self._plan.buckets[index], self._memory[index]
        current.touched[index].by_current_after_all(self._device)
        memory.flags.fill_(1)
        for slot in bucket.slots:
            if slot.param not in current.taken:
                self._add_bystander(current, slot.param)
        current.next_bucket += 1
        if self._hook is None:
            current.waits.append(self._start_all_reduce(memory.wire, waits))
            return
        gradients = memory.flat.narrow(0, 0, bucket.flags_offset)
        current.waits.append(
            self._start_hook(
                index,
                gradients,
                [slot.param for slot in bucket.slots],
                [slot.offset for slot in bucket.slots],
            )
        )

    def _launch_sparse(self, current: _Round, index: int) -> None:
        place = self._places[index]
        current.touched[place.bucket].by_current_after_all(self._device)
        place.flag.fill_(1)
        if index not in current.taken:
            self._add_bystander(current, index)
        if self._hook is None:
            current.waits.append(self._start_all_reduce(place.slot))
        else:
            nth = len(self._plan.buckets) + index - self._num_dense
            current.waits.append(self._start_hook(nth, place.slot, [index], [0]))

    def _start_all_reduce(self, tensor: torch.Tensor, waits: bool = False) -> Wait:
        options = AllreduceOptions()
        options.asyncOp = not waits
        try:
            with without_context():
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
        return self._hook.start(GradBucket(index, count, buffer, owners, offsets))

    def _add_bystander(self, current: _Round, index: int) -> None:
        """Puts into the slot what this rank has, which did not come from the round's backward."""
        param, place = self._params[index], self._places[index]
        grad, param.grad = param.grad, None
        old = grad
        accumulated = not current.is_shadow and self._is_accumulated(index, grad)
        is_dense = index < self._num_dense
        if is_dense and grad is not None and grad.is_sparse:
            grad = grad.to_dense()
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
        if self._loose_flags is not None:
            for touched in current.touched:
                touched.by_current_after_all(self._device)
            current.waits.append(self._start_all_reduce(self._loose_flags.flat))
        if not self._order_is_learned:
            self._agree_on_order(current)
        if self._may_launch_late and self._schedule.is_due:
            self._agree_on_schedule()

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
        with without_context():
            self._order = order, self._group().broadcast([order])
        self._order_is_learned = True

    def _agree_on_schedule(self) -> None:
        """Starts to add up the ranks' times; the next round begins with what they decide."""
        best = [self._schedule.early_us, self._schedule.late_us]
        times = torch.tensor(best, dtype=torch.float64)
        with without_context():
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
        if self._hook is None and launch < len(self._memory):
            memory = self._memory[launch]
            if memory.wire is not memory.flat:
                memory.flat.copy_(memory.wire)

    def _hand_out(self, current: _Round) -> None:
        self._accumulated.clear()
        for index, param in enumerate(self._params):
            self._expected[index] = max(self._expected[index], current.taken[index])
            param.grad = self._places[index].slot
        self._counts_are_learned |= not current.is_shadow
        self._read_flags(current)
        for bystander in current.bystanders:
            if self._used[bystander.param]:
                continue
            self._params[bystander.param].grad = bystander.grad
            if self._stats.rounds == 0:
                self._unused.append(self._names[bystander.param])
        if self._home is not None:  # `.grad` is going to be used here
            buffers = [buffer for memory in self._memory for buffer in (memory.flat, memory.wire)]
            keep_for_current(buffers, self._home)

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
        # Not ready, as NCCL before its first collective.
        with contextlib.suppress(RuntimeError, ValueError):
            backend = group._get_backend(device)
            if backend.supports_tensor_alloc(device):
                return backend.allocate_tensor(numel, dtype=dtype, device=device).zero_()
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


def _make_slot(
    param: torch.Tensor, flat: torch.Tensor, slot: Slot, contiguous: bool
) -> torch.Tensor:
    """Returns the slot, shaped like ``param``, and strided like it unless ``contiguous``.

    It shares the bucket's storage but is not a view to autograd, so ``grad.detach_()`` works.
    """
    dense = torch.ops.aten.is_non_overlapping_and_dense(param) and not contiguous
    stride = param.stride() if dense else torch.empty(param.shape, device="meta").stride()
    offset = slot.offset // 2 if param.is_complex() else slot.offset
    storage = torch.empty(0, dtype=param.dtype, device=param.device)
    return storage.set_(flat.untyped_storage(), offset, param.shape, stride)


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
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
