"""What one collective of a round reduces: a bucket, a sparse gradient, or the loose flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastddp.comm.loans import Loan
from fastddp.device.streams import home_of, keep_for_current
from fastddp.engine import plan
from fastddp.engine.hooks import GradBucket
from fastddp.engine.python.memory import num_references
from fastddp.engine.python.places import DensePlace, Place, SparsePlace


@dataclass(frozen=True, slots=True)
class Form:
    """How buckets are laid out, which follows from how they are sent."""

    packs: bool
    """Whether a bucket holds nothing but gradients, without gaps and row after row.

    The flags then travel apart from the buckets.
    """
    comm_dtype: torch.dtype | None
    """The dtype that gradients are cast to for the reduction; float64 gradients are not cast."""

    @property
    def align_bytes(self) -> int:
        """The multiples at which slots begin."""
        if self.packs:
            return plan.PACKED_ALIGN_BYTES
        return plan.SLOT_ALIGN_BYTES if self.comm_dtype is None else plan.CAST_ALIGN_BYTES

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which gradients of ``dtype`` are reduced."""
        if self.comm_dtype is None or dtype == torch.float64:
            return dtype
        return self.comm_dtype


@dataclass(frozen=True, slots=True)
class Collective:
    """Which of a round's collectives, in numbers that all ranks have, and in words."""

    number: int
    """Buckets come first, then sparse gradients, then the loose flags."""
    count: int
    """Collectives of a round, without that of the loose flags."""
    text: str
    """The name in messages."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks at the end of a bucket, see :mod:`fastddp.engine.marks`."""

    collective: Collective
    reduced: torch.Tensor
    """The end of the bucket; after the reduction, what the ranks have said."""
    sent: torch.Tensor
    """What this rank says."""


class Bucket:
    """What one collective of a round reduces.

    Args:
        collective: the collective that reduces the bucket.
        places: one for each parameter.
        flags: one element for each parameter: whether any rank had a gradient.
        marks: the marks at the end; None where they travel with the loose flags.
    """

    def __init__(
        self,
        collective: Collective,
        places: Sequence[Place],
        flags: torch.Tensor,
        marks: Marks | None,
    ) -> None:
        self.collective = collective
        self.places = places
        self.flags = flags
        self.marks = marks

    def sent(self) -> torch.Tensor:
        """Returns the tensor that the ranks add up."""
        raise NotImplementedError

    def for_hook(self) -> GradBucket:
        """Returns the gradients as a communication hook is given them."""
        raise NotImplementedError

    def seal(self) -> None:
        """Sets the flags as if each parameter had a gradient, and the marks."""
        self.flags.fill_(1)
        if self.marks is not None:
            self.marks.reduced.copy_(self.marks.sent)

    def cast_back(self) -> None:
        """Casts what was reduced in another dtype back to the dtype of the gradients."""


class DenseBucket(Bucket):
    """A bucket of the plan, in memory of its own.

    Args:
        collective: the collective that reduces the bucket.
        places: one for each slot of the plan's bucket, in that order.
        flags: a part of the wire, so that they need no collective, or a part of the loose flags.
        marks: a part of the wire, behind the flags; None where they travel with the loose flags.
        flat: memory of the slots.
        wire: memory that is reduced: ``flat`` itself, or a copy in the dtype for communication.
        planned: the plan's bucket.
    """

    def __init__(
        self,
        collective: Collective,
        places: Sequence[DensePlace],
        flags: torch.Tensor,
        marks: Marks | None,
        flat: torch.Tensor,
        wire: torch.Tensor,
        planned: plan.Bucket,
    ) -> None:
        super().__init__(collective, places, flags, marks)
        self.dense_places = places
        self._flat = flat
        self._wire = wire
        self._gradients = flat.narrow(0, 0, planned.flags_offset)
        self._offsets = [slot.offset for slot in planned.slots]
        self._home = home_of(flat.device)  # the stream that the memory was allocated on
        self._storage = flat.untyped_storage()
        # These come last: every view that is kept in here refers to the memory and to the tensor.
        self.loan = Loan(wire)
        self._num_references = num_references(self._storage)

    def sent(self) -> torch.Tensor:
        """See :class:`Bucket`."""
        return self._wire

    def for_hook(self) -> GradBucket:
        """See :class:`Bucket`."""
        params = [place.param.tensor for place in self.places]
        number, count = self.collective.number, self.collective.count
        return GradBucket(number, count, self._gradients, params, self._offsets)

    def cast_back(self) -> None:
        """See :class:`Bucket`."""
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)

    def keep_for_current(self) -> None:
        """Keeps the memory for the current stream, on which ``.grad`` is going to be used."""
        keep_for_current((self._flat, self._wire), self._home)

    def num_held(self) -> int:
        """Returns how many references to the memory others hold, such as ``.grad``."""
        return num_references(self._storage) - self._num_references


class SparseBucket(Bucket):
    """A sparse gradient, which has a collective to itself.

    Args:
        collective: the collective that reduces the gradient.
        place: the place of the gradient.
    """

    def __init__(self, collective: Collective, place: SparsePlace) -> None:
        super().__init__(collective, (place,), place.flag, None)
        self.place = place

    def sent(self) -> torch.Tensor:
        """See :class:`Bucket`."""
        return self.place.value

    def for_hook(self) -> GradBucket:
        """See :class:`Bucket`."""
        number, count = self.collective.number, self.collective.count
        return GradBucket(number, count, self.place.value, [self.place.param.tensor], [0])


class LooseFlags(Bucket):
    """The flags that travel in no bucket, with marks behind them.

    Args:
        collective: the collective that reduces the flags, the round's last.
        flat: memory of flags and marks.
        flags: the part of ``flat`` before the marks.
        marks: the rest of ``flat``.
    """

    def __init__(
        self,
        collective: Collective,
        flat: torch.Tensor,
        flags: torch.Tensor,
        marks: Marks,
    ) -> None:
        super().__init__(collective, (), flags, marks)
        self._flat = flat
        self.lend()

    def lend(self) -> None:
        """Begins the loan anew, now that all views that are kept refer to the memory."""
        self.loan = Loan(self._flat)

    def sent(self) -> torch.Tensor:
        """See :class:`Bucket`."""
        return self._flat

    def seal(self) -> None:
        """Sets the marks; the flags were set with the buckets that they belong to."""
        assert self.marks is not None
        self.marks.reduced.copy_(self.marks.sent)
