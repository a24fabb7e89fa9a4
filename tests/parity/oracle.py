"""What the gradients of a program must be, worked out in one process, in float64, from the docs.

The promise (docs/compatibility.md, docs/design.md), for each parameter and synchronised backward:
if any rank has used it, every rank's `.grad` becomes the average over ranks of what was in `.grad`
(nothing counts as zero) plus what this backward adds; if none has, every `.grad` stays as it is,
bit for bit. A use is a gradient from this backward, or one that `no_sync` has left in `.grad` since
the last synchronised one. A backward without synchronisation adds to this rank's `.grad` alone.

What `.grad` holds after a backward that raised is not promised, so the oracle goes on from what was
found. It predicts each operation from the state before it, not from the beginning: rounding does
not pile up, and by induction the whole program is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.parity.checks import bits, wide
from tests.parity.programs import (
    MAY_RAISE,
    REENTRANT,
    Assign,
    Backward,
    Freeze,
    Model,
    Program,
    Trace,
    Zero,
    assigned,
    backward,
    losses_of,
)


@dataclass
class _State:
    """Of one rank."""

    left: set[int] = field(default_factory=set)
    """Parameters with gradients of unsynchronised backwards."""
    maybe_left: set[int] = field(default_factory=set)
    """The same, where a backward that raised or an assignment made it unknown."""
    rounds: int = 0
    most: Counter[int] = field(default_factory=Counter)
    """By parameter, gradients in one round."""


class Oracle:
    """Checks all ranks' traces of one program."""

    def __init__(self, program: Program, traces: Sequence[Trace]) -> None:
        self._program = program
        self._traces = traces
        self._ranks = range(len(traces))
        self._plain = Model(program.params, program.terms, exactly=True)
        self._indices = range(len(program.params))
        self._states = [_State() for _ in self._ranks]

    def check(self) -> None:
        """Raises AssertionError at the first operation that did not do what it must."""
        for step, operation in enumerate(self._program.operations):
            try:
                self._check(step, operation)
            except AssertionError as error:
                raise AssertionError(f"operation {step}, {operation}: {error}") from error
        for rank, (state, trace) in enumerate(zip(self._states, self._traces, strict=True)):
            assert trace.rounds == state.rounds, f"rank {rank}: {trace.rounds} rounds in stats()"

    def _check(self, step: int, operation: object) -> None:
        if isinstance(operation, Backward):
            local = [self._local(rank, step, operation) for rank in self._ranks]
            raised = [self._raised(rank, step, operation) for rank in self._ranks]
            if operation.sync:
                self._check_round(step, operation, local, raised)
            else:
                self._check_unsynchronised(step, local, raised)
            return
        if isinstance(operation, Freeze):
            self._plain.param(operation.param).requires_grad_(not operation.frozen)
        for rank in self._ranks:
            for index in self._indices:
                self._check_assignment(step, operation, rank, index)

    def _check_assignment(self, step: int, operation: object, rank: int, index: int) -> None:
        """Checks what is no backward: `.grad` is what the program has made it, or untouched."""
        want = self._before(rank, step, index)
        state = self._states[rank]
        if isinstance(operation, Zero):
            want = None if want is None or operation.set_to_none else torch.zeros_like(want)
        elif isinstance(operation, Assign) and operation.param == index:
            spec = Model(self._program.params, self._program.terms).param(index).detach()
            want = assigned(spec, rank, operation.odd)
            if index in state.left:  # it may count as a use or not
                state.maybe_left.add(index)
        self._must_have_the_bits(rank, step, index, want)
        if want is None:  # thrown away, what was left is no use any more
            state.left.discard(index)
            state.maybe_left.discard(index)

    # ---- backwards -------------------------------------------------------------------------------

    def _check_unsynchronised(
        self, step: int, local: Sequence[Sequence[Tensor | None]], raised: Sequence[bool]
    ) -> None:
        for rank, state in enumerate(self._states):
            if raised[rank]:
                state.maybe_left.update(self._indices)
                continue
            for index in self._indices:
                new = local[rank][index]
                old = self._before(rank, step, index)
                if new is None:
                    self._must_have_the_bits(rank, step, index, old)
                    continue
                state.left.add(index)
                self._must_be_near(rank, step, index, _sum([old, new]))

    def _check_round(
        self,
        step: int,
        operation: Backward,
        local: Sequence[Sequence[Tensor | None]],
        raised: Sequence[bool],
    ) -> None:
        if not any(raised):
            for index in self._indices:
                self._check_average(step, index, [new[index] for new in local])
        for rank, state in enumerate(self._states):
            if raised[rank]:
                state.maybe_left.update(self._indices)
                continue
            state.rounds += 2 if operation.how == "twice" else 1
            state.most |= self._arrivals(rank, operation)
            state.left.clear()
            state.maybe_left.clear()

    def _check_average(self, step: int, index: int, new: Sequence[Tensor | None]) -> None:
        old = [self._before(rank, step, index) for rank in self._ranks]
        used = any(g is not None for g in new) or any(
            index in state.left and index not in state.maybe_left for state in self._states
        )
        unsure = any(
            index in state.maybe_left and g is not None
            for state, g in zip(self._states, old, strict=True)
        )
        found = [self._after(rank, step, index) for rank in self._ranks]
        kept = all(bits(a) == bits(b) for a, b in zip(found, old, strict=True))
        if not used and (kept or not unsure):
            for rank in self._ranks:
                self._must_have_the_bits(rank, step, index, old[rank])
            return
        want = _sum([*old, *new]) / len(self._ranks)
        for rank in self._ranks:
            self._must_be_near(rank, step, index, want)
            same = bits(found[rank]) == bits(found[0])
            assert same, f"p{index}: {found[rank]} on rank {rank}, {found[0]} on rank 0"

    def _local(self, rank: int, step: int, operation: Backward) -> list[Tensor | None]:
        """Returns what the backward adds on this rank, computed in double precision."""
        self._plain.zero_grad()
        if operation.by_rank[rank]:
            without_stop = Backward(operation.by_rank, how=operation.how)
            losses = losses_of(self._plain, rank, step, without_stop)
            backward(self._plain, losses, operation.how)
        grads = [self._plain.param(index).grad for index in self._indices]
        return [None if g is None else g.resolve_conj() for g in grads]

    def _raised(self, rank: int, step: int, operation: Backward) -> bool:
        """Returns whether the rank's backward raised, and checks that it was allowed to."""
        error = self._traces[rank].steps[step].raised
        if error == MAY_RAISE:
            state, arrivals = self._states[rank], self._arrivals(rank, operation)
            more = any(arrivals[index] > state.most[index] for index in self._indices)
            assert operation.sync, f"rank {rank}: {error}"
            assert more, f"rank {rank}: {error}, but there were as many before"
            assert state.rounds, f"rank {rank}: {error}, but no round was completed before"
        elif error:
            assert operation.stop is not None, f"rank {rank}: {error}"
            assert operation.stop[0] == rank, f"rank {rank}: {error}"
        return bool(error)

    def _arrivals(self, rank: int, operation: Backward) -> Counter[int]:
        """Counts each parameter's gradients: one per re-entrant checkpoint, one for all others."""
        arrivals: Counter[int] = Counter()
        others: set[int] = set()
        for chosen in operation.by_rank[rank]:
            for term in (self._program.terms[index] for index in chosen):
                reached = {i for i in term.reached if self._plain.param(i).requires_grad}
                if term.checkpointing == "reentrant" and operation.how in REENTRANT:
                    arrivals.update(reached)
                else:
                    others |= reached
        arrivals.update(others)
        return arrivals

    # ---- comparison ------------------------------------------------------------------------------

    def _before(self, rank: int, step: int, index: int) -> Tensor | None:
        return self._after(rank, step - 1, index) if step else None

    def _after(self, rank: int, step: int, index: int) -> Tensor | None:
        return self._traces[rank].steps[step].grads[index]

    def _must_have_the_bits(self, rank: int, step: int, index: int, want: Tensor | None) -> None:
        found = self._after(rank, step, index)
        assert bits(found) == bits(want), f"rank {rank}: p{index}: {found}, want exactly {want}"

    def _must_be_near(self, rank: int, step: int, index: int, want: Tensor) -> None:
        found = self._after(rank, step, index)
        assert found is not None, f"rank {rank}: p{index}: no gradient, want {want}"
        assert found.dtype == self._program.params[index].dtype
        assert wide(found).shape == want.shape
        # Each sum is of fewer than 30 roundings, of numbers that are below `size` by far.
        finite = want[want.isfinite()]
        size = 30 + (finite.abs().max().item() if finite.numel() else 0.0)
        tolerance = 30 * torch.finfo(found.dtype).eps * size
        near = torch.allclose(wide(found), want, rtol=0.0, atol=tolerance, equal_nan=True)
        assert near, f"rank {rank}: p{index}: {found}, want {want} +- {tolerance:.2g}"


def _sum(terms: Sequence[Tensor | None]) -> Tensor:
    """Returns the sum in double precision, real as in `wide`; None counts as zero."""
    return torch.stack([wide(term) for term in terms if term is not None]).sum(0)
