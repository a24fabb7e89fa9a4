"""The C++ engine behind the Python interface."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup

import fastddp._C as _C
from fastddp.compiler import untraced
from fastddp.hooks import BucketRunner, GradBucket, Wait
from fastddp.plan import Bucket, BucketPlan, Slot

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes by their number in ``csrc/core/dtype.h``."""


class NativeReducer:
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
        self._params = list(params)
        self._hook: BucketRunner | None = None
        self._reducer = _C.Reducer(
            self._params,
            list(names),
            num_sparse,
            list(frozen),
            group,
            list(caps_bytes),
            comm_dtype,
        )

    @property
    def sync(self) -> bool:
        return self._reducer.sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self._reducer.sync = value

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        self._reducer.watch(outputs)

    def set_divisor(self, divisor: float) -> None:
        self._reducer.set_divisor(divisor)

    def set_hook(self, hook: BucketRunner) -> None:
        # C++ must not own what may own this object: the garbage collector cannot look into C++.
        self._hook = hook
        this = weakref.ref(self)

        @untraced
        def native_hook(
            index: int, count: int, buffer: torch.Tensor, params: list[int], offsets: list[int]
        ) -> Wait:
            alive = this()
            assert alive is not None
            assert alive._hook is not None
            owners = [alive._params[param] for param in params]
            return alive._hook.start(GradBucket(index, count, buffer, owners, offsets))

        self._reducer.set_hook(native_hook)

    def set_after_round(self, callback: Callable[[], None] | None) -> None:
        self._reducer.set_after_round(callback)

    def outgrown(self) -> bool:
        return self._reducer.outgrown()

    def settle(self) -> bool:
        return self._reducer.settle()

    def shadow(self) -> None:
        self._reducer.shadow()

    def unused(self) -> Sequence[str]:
        return self._reducer.unused()

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
