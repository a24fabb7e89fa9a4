"""An installed plan, and the memory that it lies in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastddp.comm.loans import Loan, settle
from fastddp.device.streams import drain_current_stream
from fastddp.engine.marks import label_of, marks_of, set_changed
from fastddp.engine.plan import NUM_MARKS, BucketPlan, Slot
from fastddp.engine.python import memory
from fastddp.engine.python.bucket import (
    Bucket,
    Collective,
    DenseBucket,
    Form,
    LooseFlags,
    Marks,
    SparseBucket,
)
from fastddp.engine.python.context import Context
from fastddp.engine.python.parameters import Parameter
from fastddp.engine.python.places import DensePlace, Place, SparsePlace, make_slot
from fastddp.engine.python.tensors import is_alias, real


class Buckets:
    """The buckets of a plan, the sparse gradients after them, and the loose flags.

    Args:
        plan: the plan, equal on every rank.
        parameters: the hooked parameters, sparse ones last.
        form: how the buckets are laid out.
        context: the facts that all parts of the reducer share.
        is_lazy: whether a bucket has memory only in rounds, from the first gradient on.
        has_changed: whether the marks say that this rank's model has changed.
    """

    def __init__(
        self,
        plan: BucketPlan,
        parameters: Sequence[Parameter],
        form: Form,
        context: Context,
        *,
        is_lazy: bool,
        has_changed: bool,
    ) -> None:
        self.plan = plan
        self.is_captured = False
        """Whether a graph refers to the memory."""
        self.num_dense = len(plan.buckets)
        self._parameters = parameters
        self._form = form
        self._context = context
        self._has_changed = has_changed
        self._sent_marks: dict[int, torch.Tensor] = {}  # by collective
        self._left_flags: dict[int, torch.Tensor] = {}  # of lazy ones, since the latest round
        self._nth: dict[int, tuple[int, int]] = {
            slot.param: (number, nth)
            for number, bucket in enumerate(plan.buckets)
            for nth, slot in enumerate(bucket.slots)
        }
        sparse = [param for param in parameters if param.is_sparse]
        self._count = self.num_dense + len(sparse)
        self.flags = self._loose_flags(len(sparse) + (len(self._nth) if form.packs else 0))
        self._dense: dict[int, DenseBucket] = {}
        if not is_lazy:
            self._dense |= {number: self._install(number) for number in range(self.num_dense)}
        self._sparse: list[SparseBucket] = []
        for nth, param in enumerate(sparse):
            assert self.flags is not None
            place = SparsePlace(param, self.flags.flags[nth - len(sparse)])  # the last ones
            text = f"the sparse gradient of '{param.name}'"
            collective = Collective(self.num_dense + nth, self._count, text)
            self._sparse.append(SparseBucket(collective, place))
            self._nth[param.index] = collective.number, 0
        if self.flags is not None:
            self.flags.lend()  # once more, since the buckets' flags are views of these
        # Other streams may be the first to write to the buckets.
        drain_current_stream(context.device)

    # ---- finding ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Returns how many collectives a round has, without that of the loose flags."""
        return self._count

    def __getitem__(self, number: int) -> Bucket:
        """Returns what the collective of this number reduces."""
        if number < self.num_dense:
            return self._dense[number]
        return self._sparse[number - self.num_dense]

    def number_of(self, param: Parameter) -> int:
        """Returns which collective reduces the gradient of a parameter."""
        return self._nth[param.index][0]

    def place_of(self, param: Parameter) -> Place:
        """Returns where the gradient of a parameter goes."""
        number, nth = self._nth[param.index]
        return self[number].places[nth]

    def marks(self) -> list[Marks]:
        """Returns the marks of the round's collectives, in the order of launching."""
        loose = [] if self.flags is None else [self.flags]
        buckets: list[Bucket] = [*(self._dense[n] for n in sorted(self._dense)), *loose]
        return [bucket.marks for bucket in buckets if bucket.marks is not None]

    def loans(self) -> Iterator[Loan]:
        """Yields the loans that have to be settled before the memory is dropped."""
        yield from (bucket.loan for bucket in self._dense.values())
        if self.flags is not None:
            yield self.flags.loan

    def used_by(self) -> list[int]:
        """Returns, by parameter, how many ranks had a gradient in the latest round."""
        used = [0] * len(self._parameters)
        for number, planned in enumerate(self.plan.buckets):
            bucket = self._dense.get(number)
            flags = self._left_flags[number] if bucket is None else bucket.flags
            for slot, flag in zip(planned.slots, flags.tolist(), strict=True):
                used[slot.param] = int(flag)
        for sparse in self._sparse:
            used[sparse.place.param.index] = int(sparse.place.flag.item())
        return used

    def num_bytes(self) -> int:
        """Returns the bytes that go into the collectives of a round."""
        return sum(
            bucket.numel * self._form.wire_dtype(bucket.dtype).itemsize
            for bucket in self.plan.buckets
        )

    # ---- from round to round ---------------------------------------------------------------------

    def announce_change(self) -> None:
        """Has the marks say from now on that this rank's model has changed."""
        self._has_changed = True
        for marks in self._sent_marks.values():
            set_changed(marks)

    def allocate(self, number: int) -> bool:
        """Allocates a lazy bucket during a round; returns False if it has memory already."""
        if number >= self.num_dense or number in self._dense:
            return False
        self._dense[number] = self._install(number)
        return True

    def begin_round(self, is_captured: bool) -> None:
        """Makes sure that a round may write to the memory.

        Args:
            is_captured: whether the round is recorded into a graph, which then refers to it.
        """
        self.is_captured |= is_captured
        if not self.is_captured:  # a graph goes on to write where it did
            self._leave_what_is_held()

    def _leave_what_is_held(self) -> None:
        """Gives a bucket new memory if the script still refers to gradients in the old.

        The round may overwrite gradients that lie in ``.grad`` as they were handed out, unless the
        model has changed: then the next reducer needs them.
        """
        is_any_new = False
        for number, bucket in self._dense.items():
            num_held = bucket.num_held()
            if num_held == 0:
                continue
            in_place = sum(
                not self._has_changed and is_alias(place.param.tensor.grad, place.slot)
                for place in bucket.dense_places
            )
            if num_held > in_place:
                self._dense[number] = self._install(number)
                is_any_new = True
        if is_any_new:  # other streams may be the first to write to them
            drain_current_stream(self._context.device)

    def leave_to_script(self) -> None:
        """Leaves lazy buckets to the script: this object keeps no reference to their memory."""
        settle(bucket.loan for bucket in self._dense.values())
        for number, bucket in self._dense.items():
            self._left_flags[number] = bucket.flags.clone()
        self._dense.clear()
        for sparse in self._sparse:
            sparse.place.clear()

    def keep_for_current(self) -> None:
        """Keeps the memory for the current stream, on which ``.grad`` is going to be used."""
        for bucket in self._dense.values():
            bucket.keep_for_current()

    # ---- making ----------------------------------------------------------------------------------

    def _loose_flags(self, num_flags: int) -> LooseFlags | None:
        if num_flags == 0:
            return None
        flat = memory.allocate(num_flags + NUM_MARKS, torch.float32, self._context)
        flags, tail = flat.split([num_flags, NUM_MARKS])
        collective = Collective(self._count, self._count, "the flags of used parameters")
        return LooseFlags(collective, flat, flags, self._marks(collective, tail))

    def _install(self, number: int) -> DenseBucket:
        bucket, num_slots = self.plan.buckets[number], len(self.plan.buckets[number].slots)
        collective = Collective(number, self._count, self._describe(number))
        wire_dtype = self._form.wire_dtype(bucket.dtype)
        flat = wire = memory.allocate(bucket.numel, wire_dtype, self._context)
        if wire.dtype != bucket.dtype:
            flat = torch.zeros_like(wire, dtype=bucket.dtype)
        marks = None
        if self._form.packs:
            assert self.flags is not None
            begin = sum(len(before.slots) for before in self.plan.buckets[:number])
            flags = self.flags.flags.narrow(0, begin, num_slots)
        else:
            flags = wire.narrow(0, bucket.flags_offset, num_slots)
            tail = wire.narrow(0, bucket.flags_offset + num_slots, NUM_MARKS)
            marks = self._marks(collective, tail)
        places = [
            self._place(slot, flat, wire, flags[nth]) for nth, slot in enumerate(bucket.slots)
        ]
        return DenseBucket(collective, places, flags, marks, flat, wire, bucket)

    def _place(
        self, slot: Slot, flat: torch.Tensor, wire: torch.Tensor, flag: torch.Tensor
    ) -> DensePlace:
        param = self._parameters[slot.param]
        view = make_slot(flat, slot, param.layout, contiguous=self._form.packs)
        sent = wire.as_strided(real(view).shape, real(view).stride(), slot.offset)
        return DensePlace(param, view, sent, flag, self._context.rank)

    def _marks(self, collective: Collective, tail: torch.Tensor) -> Marks:
        sent = self._sent_marks.get(collective.number)
        if sent is None:
            values = marks_of(label_of(self._context.number, collective.number), self._has_changed)
            sent = torch.tensor(values, dtype=tail.dtype, device=tail.device)
            self._sent_marks[collective.number] = sent
        return Marks(collective, tail, sent)

    def _describe(self, number: int) -> str:
        slots = self.plan.buckets[number].slots
        names = f"'{self._parameters[slots[0].param].name}'"
        if len(slots) > 1:
            names += f" to '{self._parameters[slots[-1].param].name}'"
        return f"bucket {number + 1} of {self.num_dense} ({names})"
