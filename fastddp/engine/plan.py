"""Which gradient lies in which bucket, at which offset, and in which order buckets are reduced.

A plan is frozen data: a pure function of the parameters' sizes, the order in which the gradients
arrive, and the size caps. Ranks that agree on these agree on every collective. The C++
engine has the same function in ``csrc/core/plan.cpp``; ``tests/unit/test_plan.py`` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

SLOT_ALIGN_BYTES = 16
"""Slots begin at multiples of this, so that a wide load never straddles two gradients."""

CAST_ALIGN_BYTES = 32
"""Where gradients are cast for communication, slots begin at multiples of this.

32 bytes become 16 bytes when the dtype for communication has half the size.
"""

PACKED_ALIGN_BYTES = 1
"""With a communication hook there are no gaps: it is promised a buffer of nothing but gradients."""

NUM_MARKS = 33
"""How many marks follow the flags of a bucket, see :mod:`fastddp.engine.marks`."""

MiB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the planner knows of a parameter."""

    numel: int
    """The number of real elements; a complex element counts as two."""
    dtype: torch.dtype
    """The dtype of a real element. Parameters share a bucket only if their dtypes are equal."""

    @classmethod
    def of(cls, param: torch.Tensor) -> ParamSpec:
        """Describes ``param``, a tensor of any shape."""
        if param.is_complex():
            return cls(2 * param.numel(), param.dtype.to_real())
        return cls(param.numel(), param.dtype)


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter's place in a bucket, in elements."""

    param: int
    offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """The slots that one collective reduces, and the flags and marks behind them."""

    dtype: torch.dtype
    slots: tuple[Slot, ...]
    """In the order in which their gradients arrive."""
    flags_offset: int
    """The offset of the flags: one element per slot says whether any rank had a gradient for it."""
    numel: int
    """The number of elements of slots, padding, flags and marks together."""


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """All buckets, in the order in which every rank launches them."""

    buckets: tuple[Bucket, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of all buckets, which go into collectives unless gradients are cast."""
        return sum(bucket.numel * bucket.dtype.itemsize for bucket in self.buckets)


def plan_buckets(
    params: Sequence[ParamSpec],
    order: Sequence[int],
    caps_bytes: Sequence[int],
    align_bytes: int = SLOT_ALIGN_BYTES,
) -> BucketPlan:
    """Returns the buckets in the order in which they fill when gradients arrive in ``order``.

    Args:
        params: the sizes and dtypes of the parameters, by index.
        order: the parameters' indices in the order in which their gradients arrive.
        caps_bytes: the sizes of buckets: the k-th bucket of a dtype is closed once it holds
            ``caps_bytes[k]`` bytes, and the last entry serves all further buckets.
        align_bytes: the multiple at which slots begin, if it is larger than an element.

    Raises:
        ValueError: if ``caps_bytes`` is empty or ``order`` is not a permutation.
    """
    if not caps_bytes:
        raise ValueError("plan_buckets: no bucket cap was given")
    if sorted(order) != list(range(len(params))):
        raise ValueError(
            f"plan_buckets: the order is not a permutation of {len(params)} parameters"
        )

    filling: dict[torch.dtype, _Filling] = {}
    closed: list[_Filling] = []
    num_closed: dict[torch.dtype, int] = {}
    for arrival, index in enumerate(order):
        dtype = params[index].dtype
        bucket = filling.setdefault(dtype, _Filling(dtype, align_bytes))
        bucket.add(index, params[index].numel, arrival)
        nth = num_closed.get(dtype, 0)
        if bucket.numel * dtype.itemsize >= caps_bytes[min(nth, len(caps_bytes) - 1)]:
            closed.append(filling.pop(dtype))
            num_closed[dtype] = nth + 1
    closed.extend(filling.values())
    closed.sort(key=lambda bucket: bucket.last_arrival)
    return BucketPlan(tuple(bucket.close() for bucket in closed))


@dataclass(slots=True)
class _Filling:
    """A bucket that is still open for slots."""

    dtype: torch.dtype
    align_bytes: int
    slots: list[Slot] = field(default_factory=list)
    numel: int = 0
    last_arrival: int = 0

    def add(self, index: int, numel: int, arrival: int) -> None:
        self.slots.append(Slot(index, self.numel, numel))
        self.numel = self._align(self.numel + numel)
        self.last_arrival = arrival

    def close(self) -> Bucket:
        numel = self._align(self.numel + len(self.slots) + NUM_MARKS)
        return Bucket(self.dtype, tuple(self.slots), self.numel, numel)

    def _align(self, numel: int) -> int:
        step = max(1, self.align_bytes // self.dtype.itemsize)
        return -(-numel // step) * step
