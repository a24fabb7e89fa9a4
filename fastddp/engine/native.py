"""The C++ engine behind the Python interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

import fastddp._C as _C
from fastddp.plan import Bucket, BucketPlan, Slot

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes by their number in ``csrc/core/dtype.h``."""


class NativeReducer:
    """See :class:`fastddp.engine.Reducer`."""

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        group: ProcessGroup,
        caps_bytes: Sequence[int],
    ) -> None:
        self._reducer = _C.Reducer(list(params), list(names), group, list(caps_bytes))

    @property
    def sync(self) -> bool:
        return self._reducer.sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self._reducer.sync = value

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        self._reducer.watch(outputs)

    def close(self) -> None:
        self._reducer.close()

    def stats(self) -> _C.Stats:
        return self._reducer.stats()

    def plan(self) -> BucketPlan:
        return from_native(self._reducer.plan())


def from_native(buckets: Sequence[_C.BucketPlan]) -> BucketPlan:
    """Returns a C++ plan as the Python one."""
    return BucketPlan(
        tuple(
            Bucket(
                dtype=KINDS[bucket.kind],
                slots=tuple(Slot(slot.param, slot.offset, slot.numel) for slot in bucket.slots),
                flags_offset=bucket.flags_offset,
                numel=bucket.numel,
            )
            for bucket in buckets
        )
    )
