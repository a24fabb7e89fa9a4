"""Which gradient lies in which bucket, at which offset, and in which order buckets are reduced.

A plan is frozen data and a pure function of the parameters' sizes, the order in which their
gradients arrive and the size caps: ranks that agree on these agree on every collective. The C++
engine has the same function in ``csrc/core/plan.cpp``; ``tests/unit/test_plan.py`` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

SLOT_ALIGN_BYTES = 16
"""Slots begin at multiples of this, so that a wide load never straddles two gradients."""

CAST_ALIGN_BYTES = 32
"""The same where gradients are cast for communication: 32 bytes are 16 in half the size."""

PACKED_ALIGN_BYTES = 1
"""For a communication hook, which is promised a buffer with nothing but gradients in it."""

NUM_MARKS = 33
"""Elements behind a bucket's flags, see :mod:`fastddp.engine.marks`."""

MiB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the planner knows of a parameter."""

    numel: int
    """Real elements: a complex parameter counts two for each of its own."""
    dtype: torch.dtype
    """Of one real element. Parameters share a bucket only when their dtypes are equal."""

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
    """The slots that one collective reduces."""

    dtype: torch.dtype
    slots: tuple[Slot, ...]
    """In the order in which their gradients arrive."""
    flags_offset: int
    """Where one element per slot, in slot order, says whether any rank had a gradient for it."""
    numel: int
    """Of the slots, their padding, the flags and the marks that follow them."""


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """All buckets, in the order in which every rank launches them."""

    buckets: tuple[Bucket, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the gradients; as many go into collectives, unless they are cast for them."""
        return sum(bucket.numel * bucket.dtype.itemsize for bucket in self.buckets)


def plan_buckets(
    params: Sequence[ParamSpec],
    order: Sequence[int],
    caps_bytes: Sequence[int],
    align_bytes: int = SLOT_ALIGN_BYTES,
) -> BucketPlan:
    """Returns the buckets in the order in which they fill when gradients arrive in ``order``.

    Args:
        params: the parameters, by index.
        order: a permutation of their indices.
        caps_bytes: the k-th bucket of a dtype is closed once it holds ``caps_bytes[k]`` bytes; the
            last entry serves all further ones.
        align_bytes: slots begin at multiples of this, or of an element.

    Raises:
        ValueError: if ``caps_bytes`` is empty or ``order`` is not a permutation.
    """
    if not caps_bytes:
        raise ValueError("plan_buckets: no bucket cap was given")
    if sorted(order) != list(range(len(params))):
        raise ValueError(f"plan_buckets: the order is no permutation of {len(params)} parameters")

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
    """A bucket that still takes slots."""

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
