"""Communication hooks: what they are given, and how their results are waited for."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup

from fastddp.comm.loans import Loan, settle
from fastddp.device.streams import has_streams

Future = Any  # torch._C.Future, which has no type parameter and is the base of torch.futures.Future
Wait = Callable[[], None]
CommHook = Callable[["GradBucket"], Any]
"""Starts to communicate a bucket and returns a ``torch.futures.Future`` of the result."""


class GradBucket:
    """The gradients that a hook is to reduce; has the methods of ``torch.distributed.GradBucket``.

    Args:
        index: the number of the bucket in the round; a hook is given the buckets in this order.
        count: the number of buckets in the round.
        buffer: the gradients in one vector, without gaps and not divided by anything; or one sparse
            gradient.
        params: the parameters that the gradients belong to.
        offsets: the first element of each gradient in ``buffer``.
    """

    def __init__(
        self,
        index: int,
        count: int,
        buffer: Tensor,
        params: Sequence[torch.nn.Parameter],
        offsets: Sequence[int],
    ) -> None:
        self._index = index
        self._count = count
        self._buffer = buffer
        self._params = list(params)
        self._offsets = list(offsets)

    def index(self) -> int:
        """Returns the number of this bucket in the round."""
        return self._index

    def is_last(self) -> bool:
        """Returns whether this is the last bucket of this backward."""
        return self._index == self._count - 1

    def buffer(self) -> Tensor:
        """Returns the gradients as one vector, or the one sparse gradient."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Replaces the vector; ``gradients()`` then returns views of the new one."""
        self._buffer = buffer

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns the parameters that the gradients belong to."""
        return self._params

    def gradients(self) -> list[Tensor]:
        """Returns the gradients by parameter: views of the buffer in the parameters' shapes."""
        if self._buffer.is_sparse:
            return [self._buffer]
        return [
            _view(self._buffer, param, offset)
            for param, offset in zip(self._params, self._offsets, strict=True)
        ]


class BucketRunner(Protocol):
    """Communicates buckets: by a hook of the user's, or in a way of our own."""

    def start(self, bucket: GradBucket) -> Wait:
        """Starts to communicate a bucket; called for each bucket, on every rank in the same order.

        Returns:
            A function that waits for the result and puts it where the gradients were.
        """

    def let_go(self) -> None:
        """Drops all references to buckets that have been waited for."""


class HookRunner:
    """Runs a hook; on the CPU, one bucket at a time.

    On the CPU, a future's callbacks run on a thread of the transport at any moment. If they
    communicated while this thread does too, the ranks would disagree on the order of collectives.
    So a bucket is given to the hook only when the bucket before is done.

    Args:
        hook: the function to call with each bucket, on every rank in the same order.
        timeout_s: the longest time that a bucket may take, in seconds.
    """

    def __init__(self, hook: CommHook, timeout_s: float) -> None:
        self._hook = hook
        self._timeout_s = timeout_s
        self._await_latest: Wait | None = None
        self._loans: dict[int, Loan] = {}  # until the same is lent again

    def __del__(self) -> None:
        settle(self._loans.values())

    def start(self, bucket: GradBucket) -> Wait:
        """Gives the bucket to the hook.

        Returns:
            A function that waits for the hook's result and puts it where the gradients were. It
            raises what the hook's future raises. It raises RuntimeError if the future holds
            anything other than a tensor of the buffer's size, or is not completed in time.

        Raises:
            RuntimeError: if the hook returns something that is not a future.
        """
        gradients = bucket.buffer()
        if bucket.index() == 0:  # of another plan, perhaps
            self._loans = {n: loan for n, loan in self._loans.items() if not loan.is_settled()}
        self._loans[bucket.index()] = Loan(gradients)
        await_latest, self._await_latest = self._await_latest, None
        if await_latest is not None:
            await_latest()
        future = self._hook(bucket)
        if not isinstance(future, torch._C.Future):
            raise RuntimeError(
                "callback must return a torch.futures.Future object, but got"
                f" {type(future).__module__}.{type(future).__qualname__}; return"
                " work.get_future(), or a Future whose set_result() was called"
            )
        what = f"the future that the communication hook returned for bucket {bucket.index() + 1}"
        if has_streams(gradients.device):
            await_done: Wait = partial(await_future, future, self._timeout_s, what)
        else:
            await_done = self._await_latest = deadline(future, self._timeout_s, what)

        def wait() -> None:
            await_done()
            _put(gradients, _result(future, gradients.numel()))

        return wait

    def let_go(self) -> None:
        """See :class:`BucketRunner`."""
        settle(self._loans.values())
        self._loans.clear()


def deadline(future: Future, timeout_s: float, what: str) -> Wait:
    """Returns a function that waits until a future is done, or the time is over.

    Args:
        future: the future, which may hold an error in the end.
        timeout_s: the longest wait in seconds, counted from the call of the function.
        what: the name of the future in the message.

    Raises:
        RuntimeError: when the function is called, if the future takes longer.
    """
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())

    def wait() -> None:
        if not done.wait(timeout_s):
            raise RuntimeError(
                f"fastddp: {what} was not completed within {timeout_s:g} s, the process group's"
                " timeout; does the hook call set_result() on it?"
            )

    return wait


def await_future(future: Future, timeout_s: float, what: str) -> None:
    """Waits until a future is done, see :func:`deadline`.

    The future of a collective on a device is done as soon as everything is launched."""
    if not future.done():
        deadline(future, timeout_s, what)()


def _result(future: Future, numel: int) -> Tensor:
    result = future.wait()
    if isinstance(result, (list, tuple)) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor) or result.numel() != numel:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RuntimeError(
            "fastddp: a communication hook's future must hold one tensor with as many elements"
            f" as bucket.buffer(), {numel}, but holds {got}"
        )
    return result


def _put(gradients: Tensor, result: Tensor) -> None:
    with torch.no_grad():
        if gradients.is_sparse:
            if result is not gradients:
                gradients.copy_(result)
        elif result.data_ptr() != gradients.data_ptr() or result.dtype != gradients.dtype:
            gradients.copy_(result.reshape(gradients.shape))


def _view(buffer: Tensor, param: Tensor, offset: int) -> Tensor:
    if param.is_complex() and not buffer.is_complex():
        real = buffer[offset : offset + 2 * param.numel()]
        return torch.view_as_complex(real.view(*param.shape, 2))
    return buffer[offset : offset + param.numel()].view(param.shape)


def check(hook: Callable[..., Any]) -> None:
    """Checks that something may be a communication hook.

    Raises:
        TypeError: if it cannot be called.
        ValueError: if the annotations are not those of a hook.
    """
    if not callable(hook):
        raise TypeError("Communication hook must be callable.")
    signature = inspect.signature(hook)
    bucket = signature.parameters.get("bucket")
    annotations = (inspect.Parameter.empty, c10d.GradBucket, GradBucket)
    if bucket is not None and not _is_one_of(bucket.annotation, annotations):
        raise ValueError("Communication hook: bucket annotation should be dist.GradBucket.")
    returns = (inspect.Signature.empty, torch.futures.Future[Tensor], torch.futures.Future)
    if not _is_one_of(signature.return_annotation, returns):
        raise ValueError(
            "Communication hook: return annotation should be torch.futures.Future[torch.Tensor]."
        )


def _is_one_of(annotation: object, known: Sequence[object]) -> bool:
    # A string is what `from __future__ import annotations` makes of any of them.
    return isinstance(annotation, str) or annotation in known


def builtin(kind: Any, group: Callable[[], ProcessGroup]) -> CommHook:
    """Returns the hook that torch's ``BuiltinCommHookType`` names.

    Args:
        kind: a member of ``BuiltinCommHookType``.
        group: a function that returns the process group to reduce in.

    Raises:
        ValueError: if the kind is not known.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    known = {
        c10d.BuiltinCommHookType.ALLREDUCE: default_hooks.allreduce_hook,
        c10d.BuiltinCommHookType.FP16_COMPRESS: default_hooks.fp16_compress_hook,
    }
    if kind not in known:
        raise ValueError(f"fastddp: {kind!r} is not one of {', '.join(map(str, known))}")
    hook: Any = known[kind]  # takes any bucket that has the methods
    return lambda bucket: hook(group(), bucket)
