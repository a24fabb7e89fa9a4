"""The Python engine: the reducer's specification, in plain torch.

One synchronised backward is a *round*. Its life:

* it begins: ``_begin_round`` installs the plan if a new one is due and asks autograd to call back
  at the end of this backward.
* each gradient: ``_take`` scales it into its slot, empties ``.grad`` and launches the buckets that
  are full, in plan order.
* end of backward: ``_finish_round`` launches what is left, waits, and makes each ``.grad`` the
  reduced slot.
* backward raised: ``_abandon_round`` launches what is left and waits for nothing.

A round begins when backward reaches an output of forward, or at the first gradient if there is no
such output. The former is the same on every rank, whatever parameters it goes on to reach, and is
outside of any re-entrant backward.

Every rank launches every bucket in every round, also those it has no gradient for, so ranks stay in
step when they use different parameters or when one of them raises. ``.grad`` is empty while its
bucket is in flight, so nothing but the collective can touch a launched bucket.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed import ProcessGroup, Work

from fastddp.collectives import Loan
from fastddp.compiler import refuse_compiled_autograd, untraced
from fastddp.plan import Bucket, BucketPlan, ParamSpec, Slot, plan_buckets


@dataclass(frozen=True, slots=True)
class RoundStats:
    """See :class:`fastddp.engine.Stats`."""

    rounds: int = 0
    wait_us_total: float = 0.0
    wait_us_last: float = 0.0
    bytes_per_round: int = 0
    num_buckets: int = 0


@dataclass(slots=True)
class _Place:
    """Where a parameter's gradient goes under the installed plan."""

    bucket: int
    slot: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Memory:
    """An installed bucket."""

    flat: torch.Tensor
    flags: torch.Tensor
    loan: Loan


@dataclass(frozen=True, slots=True)
class _Bystander:
    """A gradient that the round's own backward did not produce, as it was before the round."""

    param: int
    grad: torch.Tensor | None
    flag: torch.Tensor


@dataclass(slots=True)
class _Round:
    missing: list[int]
    """By bucket, gradients still to come."""
    next_bucket: int = 0
    taken: Counter[int] = field(default_factory=Counter)
    """By parameter, gradients so far."""
    arrival: list[int] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    bystanders: list[_Bystander] = field(default_factory=list)


class _RoundEnd:
    """Lives in the backward's list of callbacks: called at its end, or dropped when it raised."""

    def __init__(self, reducer: PythonReducer) -> None:
        self._reducer = reducer
        self._open = True

    @untraced
    def __call__(self) -> None:
        self._open = False
        self._reducer._finish_round()

    @untraced
    def __del__(self) -> None:
        if self._open:
            self._reducer._abandon_round()


class PythonReducer:
    """See :class:`fastddp.engine.Reducer`."""

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        group: ProcessGroup,
        caps_bytes: Sequence[int],
    ) -> None:
        self.sync = True
        self._memory: list[_Memory] = []  # empty until the plan is installed
        self._params = list(params)
        self._names = list(names)
        self._specs = [ParamSpec.of(param) for param in params]
        # Weak: whoever frees a process group last joins its threads, and must not hold the GIL.
        self._group_ref = weakref.ref(group)
        self._rank = group.rank()
        self._scale = 1.0 / group.size()
        self._caps_bytes = list(caps_bytes)
        # Until the arrival order is known: gradients come back roughly in the reverse order.
        order = list(reversed(range(len(self._params))))
        self._plan = plan_buckets(self._specs, order, self._caps_bytes)

        self._places: dict[int, _Place] = {}
        self._accumulated: set[int] = set()  # hold gradients of unsynchronised backwards
        self._expected = [1] * len(self._params)  # gradients per round: the most there have been
        self._agreement: tuple[torch.Tensor, Work] | None = None
        self._order_is_learned = False
        self._stats = RoundStats()
        self._round: _Round | None = None

        # A tensor holds its gradient node weakly: kept here, or the hook would go with the node.
        self._nodes = [get_gradient_edge(param).node for param in self._params]
        this = weakref.ref(self)
        self._hooks = [
            node.register_hook(_gradient_hook(this, nth)) for nth, node in enumerate(self._nodes)
        ]

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        this = weakref.ref(self)
        for output in outputs:
            if output.requires_grad and not output.is_leaf:
                output.register_hook(_backward_hook(this))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __del__(self) -> None:
        for memory in self._memory:
            memory.loan.settle()

    def stats(self) -> RoundStats:
        return self._stats

    def plan(self) -> BucketPlan:
        return self._plan

    # ---- called by autograd ----------------------------------------------------------------------

    @torch.no_grad()
    def _on_backward(self) -> None:
        if self._round is not None or not self.sync or not _accumulates():
            return
        if any(param.requires_grad for param in self._params):
            self._round = self._begin_round()

    @torch.no_grad()
    def _on_gradient(self, index: int) -> None:
        if self._round is None:
            if not self.sync:
                self._accumulated.add(index)
                return
            self._round = self._begin_round()
        self._take(self._round, index)

    @torch.no_grad()
    def _finish_round(self) -> None:
        current, self._round = self._round, None
        assert current is not None
        try:
            self._flush(current)
            start = time.perf_counter()
            for bucket in range(len(self._memory)):
                self._wait_for(current, bucket)
            wait_us = (time.perf_counter() - start) * 1e6
        except BaseException:
            self._memory.clear()  # a collective may still write to it
            raise
        self._hand_out(current)
        self._stats = replace(
            self._stats,
            rounds=self._stats.rounds + 1,
            wait_us_last=wait_us,
            wait_us_total=self._stats.wait_us_total + wait_us,
        )

    @torch.no_grad()
    def _abandon_round(self) -> None:
        current, self._round = self._round, None
        if current is None:
            return
        # The backward's own exception is on its way to the user and says more than one of these.
        with contextlib.suppress(Exception):
            self._flush(current)
        self._memory.clear()  # collectives still write to it; the next round gets its own

    # ---- one round -------------------------------------------------------------------------------

    def _begin_round(self) -> _Round:
        refuse_compiled_autograd()  # or gradients get lost without a word
        if self._agreement is not None:
            order, work = self._agreement
            work.wait()
            self._agreement = None
            plan = plan_buckets(self._specs, order.tolist(), self._caps_bytes)
            if plan != self._plan:
                self._plan = plan
                self._memory.clear()
        if not self._memory:
            self._install_plan()
        torch.autograd.Variable._execution_engine.queue_callback(_RoundEnd(self))
        return _Round(missing=[len(bucket.slots) for bucket in self._plan.buckets])

    def _install_plan(self) -> None:
        self._places.clear()  # frees the old buckets before the new are allocated
        for index, bucket in enumerate(self._plan.buckets):
            flat = self._allocate(bucket)
            flags = flat.narrow(0, bucket.flags_offset, len(bucket.slots))
            self._memory.append(_Memory(flat, flags, Loan(flat)))
            for slot in bucket.slots:
                view = _make_slot(self._params[slot.param], flat, slot)
                self._places[slot.param] = _Place(index, view)
        self._stats = replace(
            self._stats, bytes_per_round=self._plan.num_bytes, num_buckets=len(self._memory)
        )

    def _take(self, current: _Round, index: int) -> None:
        param, place = self._params[index], self._places[index]
        grad = param.grad
        if grad is None:
            return
        if grad.is_sparse:
            raise NotImplementedError(
                f"fastddp: parameter '{self._names[index]}' has a sparse gradient, which is not"
                " supported yet; use sparse=False"
            )
        taken = current.taken[index]
        if taken == 0:
            _write(place.slot, grad, self._scale)
            current.arrival.append(index)
        elif current.next_bucket <= place.bucket:
            _real(place.slot).add_(_real(_resolved(grad)).mul(self._scale))
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
        # one backward (re-entrant checkpoints that share it bring several) is only known then.
        if not self._order_is_learned:
            return
        while (
            current.next_bucket < len(current.missing) and current.missing[current.next_bucket] == 0
        ):
            self._launch(current)

    def _launch(self, current: _Round) -> None:
        """Fills in what this rank has no gradient for, then sends the next bucket on its way."""
        memory = self._memory[current.next_bucket]
        memory.flags.fill_(1)
        for nth, slot in enumerate(self._plan.buckets[current.next_bucket].slots):
            if slot.param not in current.taken:
                self._add_bystander(current, slot.param, memory.flags[nth])
        current.next_bucket += 1
        with _without_context():
            current.works.append(self._group().allreduce([memory.flat]))

    def _add_bystander(self, current: _Round, index: int, flag: torch.Tensor) -> None:
        param, slot = self._params[index], self._places[index].slot
        grad, param.grad = param.grad, None
        old = grad
        if grad is None:
            slot.zero_()
        elif index in self._accumulated:  # what unsynchronised backwards left is this one's too
            _write(slot, grad, self._scale)
            return
        else:
            # The reduction overwrites the slot. If no rank has a new gradient the old must come
            # back bit for bit.
            if _shares_storage(grad, slot):
                old = grad.clone()
            _write(slot, grad, self._scale)
        flag.zero_()
        current.bystanders.append(_Bystander(index, old, flag))

    def _flush(self, current: _Round) -> None:
        while current.next_bucket < len(current.missing):
            self._launch(current)
        if not self._order_is_learned:
            self._agree_on_order(current)

    def _agree_on_order(self, current: _Round) -> None:
        """Starts to send rank 0's arrival order to all; the next round begins with its plan."""
        slots = (slot.param for bucket in self._plan.buckets for slot in bucket.slots)
        rest = [index for index in slots if index not in current.taken]
        order = torch.tensor(current.arrival + rest, device=self._params[0].device)
        with _without_context():
            self._agreement = order, self._group().broadcast([order])
        self._order_is_learned = True

    def _wait_for(self, current: _Round, bucket: int) -> None:
        try:
            current.works[bucket].wait()
        except RuntimeError as error:
            raise torch.distributed.DistBackendError(
                f"fastddp: rank {self._rank}: the all-reduce of {self._describe(bucket)} failed:"
                f" {error}"
            ) from error

    def _hand_out(self, current: _Round) -> None:
        self._accumulated.clear()
        for index, param in enumerate(self._params):
            self._expected[index] = max(self._expected[index], current.taken[index])
            param.grad = self._places[index].slot
        for bystander in current.bystanders:
            # Reading a flag from a device waits for it, which only a rank without a gradient does.
            if not bystander.flag.item():
                self._params[bystander.param].grad = bystander.grad

    # ---- memory and names ------------------------------------------------------------------------

    def _allocate(self, bucket: Bucket) -> torch.Tensor:
        """Returns zeroed memory, so that the padding between slots sums to zero for ever."""
        device = self._params[0].device
        backend = self._group()._get_backend(device)
        if backend.supports_tensor_alloc(device):
            flat = backend.allocate_tensor(bucket.numel, dtype=bucket.dtype, device=device)
            return flat.zero_()
        return torch.zeros(bucket.numel, dtype=bucket.dtype, device=device)

    def _group(self) -> ProcessGroup:
        group = self._group_ref()
        if group is None:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: the process group of this model was destroyed before"
                " its backward; call destroy_process_group() after the last step"
            )
        return group

    def _describe(self, bucket: int) -> str:
        slots = self._plan.buckets[bucket].slots
        names = f"'{self._names[slots[0].param]}'"
        if len(slots) > 1:
            names += f" to '{self._names[slots[-1].param]}'"
        return f"bucket {bucket + 1} of {len(self._plan.buckets)} ({names})"


@contextlib.contextmanager
def _without_context() -> Iterator[None]:
    """Hides Python's context variables from what a collective copies of the thread's state.

    During a backward, torch keeps them in thread-local state, and a collective copies that into its
    work. The transport's thread often frees the last copy, for which it needs the GIL; if the
    interpreter is ending just then, the process aborts.
    """
    if not torch._C._is_key_in_tls("context"):
        yield
        return
    context = torch._C._get_obj_in_tls("context")
    torch._C._remove_obj_from_tls("context")
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls("context", context)


def _backward_hook(reducer: weakref.ref[PythonReducer]) -> Callable[[torch.Tensor], None]:
    @untraced
    def hook(_: torch.Tensor) -> None:
        alive = reducer()
        if alive is not None:
            alive._on_backward()

    return hook


def _accumulates() -> bool:
    """Returns whether the current backward is one that fills ``.grad``.

    ``autograd.grad()`` and ``backward(inputs=...)`` are not, and need not involve the other ranks.
    They pass by every leaf that they were not asked for; so one leaf below tells.
    """
    node: Node | None = torch._C._current_autograd_node()
    while node is not None and not hasattr(node, "variable"):  # until it is a leaf's
        node = next((below for below, _ in node.next_functions if below is not None), None)
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad() was asked for this very leaf
        return False


def _gradient_hook(reducer: weakref.ref[PythonReducer], index: int) -> Callable[..., None]:
    @untraced
    def hook(*_: object) -> None:
        alive = reducer()
        if alive is not None:
            alive._on_gradient(index)

    return hook


def _make_slot(param: torch.Tensor, flat: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Returns the slot, shaped and strided like ``param``.

    It shares the bucket's storage but is not a view to autograd, so ``grad.detach_()`` works.
    """
    dense = torch.ops.aten.is_non_overlapping_and_dense(param)
    stride = param.stride() if dense else torch.empty(param.shape, device="meta").stride()
    offset = slot.offset // 2 if param.is_complex() else slot.offset
    storage = torch.empty(0, dtype=param.dtype, device=param.device)
    return storage.set_(flat.untyped_storage(), offset, param.shape, stride)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _write(slot: torch.Tensor, grad: torch.Tensor, scale: float) -> None:
    torch.mul(_real(_resolved(grad)), scale, out=_real(slot))


def _resolved(grad: torch.Tensor) -> torch.Tensor:
    """Returns the gradient with its values in memory, not with a lazy conjugation or negation."""
    return grad.resolve_conj().resolve_neg()


def _shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
