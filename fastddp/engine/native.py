"""The C++ engine, with the interface of a reducer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup

import fastddp._C as _C
from fastddp.device.compiler import untraced
from fastddp.engine.hooks import BucketRunner, GradBucket, Wait
from fastddp.engine.interface import Settings, Subject
from fastddp.engine.news import News
from fastddp.engine.plan import Bucket, BucketPlan, Slot
from fastddp.engine.stats import Stats

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes by the numbers that they have in ``csrc/core/dtype.h``."""


class NativeReducer:
    """See :class:`fastddp.engine.interface.Reducer`."""

    def __init__(self, subject: Subject, group: ProcessGroup, settings: Settings) -> None:
        self._params = list(subject.params)
        self._hook: BucketRunner | None = None
        self._former_hook: BucketRunner | None = None
        self._reducer = _C.Reducer(
            self._params,
            list(subject.names),
            subject.num_sparse,
            list(subject.frozen),
            group,
            list(settings.caps_bytes),
            settings.comm_dtype,
            owner=subject.number,
            title=subject.title,
            lazy=settings.lazy,
        )

    @property
    def sync(self) -> bool:
        return self._reducer.sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self._reducer.sync = value

    @property
    def manual(self) -> bool:
        return self._reducer.manual

    @manual.setter
    def manual(self, value: bool) -> None:
        self._reducer.manual = value

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        self._reducer.watch(outputs)

    def set_divisor(self, divisor: float) -> None:
        self._reducer.set_divisor(divisor)

    def set_hook(self, hook: BucketRunner) -> None:
        # C++ must not own what may own this object: the garbage collector cannot look into C++.
        # A round under way goes on with the hook that it began with, which is kept for it.
        self._former_hook, self._hook = self._hook, hook
        this, runner = weakref.ref(self), weakref.ref(hook)

        @untraced
        def native_hook(
            index: int, count: int, buffer: torch.Tensor, params: list[int], offsets: list[int]
        ) -> Wait:
            alive, hook = this(), runner()
            assert alive is not None
            assert hook is not None
            owners = [alive._params[param] for param in params]
            return hook.start(GradBucket(index, count, buffer, owners, offsets))

        @untraced
        def native_let_go() -> None:
            hook = runner()
            if hook is not None:
                hook.let_go()

        self._reducer.set_hook(native_hook, native_let_go)

    def set_after_round(self, callback: Callable[[], None] | None) -> None:
        self._reducer.set_after_round(callback)

    def set_on_news(self, callback: Callable[[News], None]) -> None:
        self._reducer.set_on_news(lambda news: callback(News(news)))

    @property
    def has_left_news(self) -> bool:
        return self._reducer.has_left_news

    @property
    def began_ns(self) -> int:
        return self._reducer.began_ns

    @property
    def rounds(self) -> int:
        return self._reducer.rounds

    def read_left_news(self) -> bool:
        return self._reducer.read_left_news()

    def leave_news(self) -> None:
        self._reducer.leave_news()

    def is_stale(self) -> bool:
        return self._reducer.is_stale()

    def retire(self) -> None:
        self._reducer.retire()

    def is_in_flight(self) -> bool:
        return self._reducer.is_in_flight()

    def finalize(self) -> None:
        self._reducer.finalize()

    def average(self) -> None:
        self._reducer.average()

    def outgrown(self) -> bool:
        return self._reducer.outgrown()

    def settle(self) -> bool:
        return self._reducer.settle()

    def shadow(self) -> None:
        self._reducer.shadow()

    def unused(self) -> Sequence[str]:
        return self._reducer.unused()

    def error(self) -> str:
        return self._reducer.error()

    def used_by(self) -> Sequence[int]:
        return self._reducer.used_by()

    def close(self) -> None:
        self._reducer.close()

    def stats(self) -> Stats:
        return Stats(**self._reducer.stats())

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
