"""`patch`: code that constructs `torch.nn.parallel.DistributedDataParallel` gets fastddp's class.

Frameworks make the wrapper themselves, and many of them bound torch's class to a name of their own
when they were imported. So no name is replaced. Torch's class stays torch's class in every
`isinstance` check and every pickled reference; only *constructing* it inside a block makes an
instance of fastddp's class, which is a subclass.

A block is open for the thread and context that opened it, not for the process. Otherwise a thread
that wraps a model while another thread's block happens to be open would get fastddp's class on one
rank and torch's on the next, and the two cannot communicate with each other.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

from torch.nn.parallel import DistributedDataParallel as TorchDDP

from fastddp.ddp.wrapper import DistributedDataParallel

_Function = TypeVar("_Function", bound=Callable[..., Any])

_depth: ContextVar[int] = ContextVar("fastddp.patch", default=0)
"""The number of open blocks around the running code."""


def patch() -> _Patch:
    """Makes torch's ``DistributedDataParallel`` construct fastddp's, inside a block or a function.

    For code that wraps the model itself, such as a framework or a script that must not change.
    Inside the block, constructing exactly torch's class gives fastddp's class, under whatever name
    the code knows torch's class. Subclasses of torch's class are not affected, nor are other
    threads, nor processes that are started inside. When the last block ends, torch's class is as it
    was before; models that were wrapped inside keep fastddp's class.

    Opening a block is not collective, but wrapping a model inside is, so all ranks have to do it.
    Several threads may have blocks open at the same time.

    Returns:
        A context manager, which may be entered several times and nested. As a decorator it opens a
        block for each call of the function. Without either it does nothing.

    Warns:
        RuntimeWarning: if the result is dropped without having been entered or used as a decorator.

    Example::

        with fastddp.patch():
            trainer.train()


        @fastddp.patch()
        def main(): ...
    """
    return _Patch()


class _Patch(ContextDecorator):
    def __init__(self) -> None:
        self._used = False

    def __enter__(self) -> None:
        self._used = True
        _hold()
        _depth.set(_depth.get() + 1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _depth.set(_depth.get() - 1)
        _release()

    def __call__(self, func: _Function) -> _Function:
        self._used = True  # the function enters a block of its own at each call
        return super().__call__(func)

    def __del__(self) -> None:
        # `fastddp.patch()` on a line of its own looks as if it had an effect.
        if not self._used:
            warnings.warn(
                "fastddp.patch() was called but not entered, so nothing has changed; write"
                " `with fastddp.patch():`, or `@fastddp.patch()` above a function",
                RuntimeWarning,
                stacklevel=2,
            )


# ---- torch's constructor, replaced while any block of the process is open -----------------------

_lock = threading.Lock()
_open_blocks = 0
_installed: Callable[..., None]
_original: Callable[..., None]


def _hold() -> None:
    global _open_blocks, _installed, _original
    with _lock:
        if _open_blocks == 0:
            _original = TorchDDP.__init__
            _installed = _redirecting(_original)
            TorchDDP.__init__ = _installed  # type: ignore[method-assign]
        _open_blocks += 1


def _release() -> None:
    global _open_blocks
    with _lock:
        _open_blocks -= 1
        # Another package may have wrapped the constructor since. Then its constructor stays, and
        # calls the one from here, which outside of a block only calls the original.
        if _open_blocks == 0 and TorchDDP.__init__ is _installed:
            TorchDDP.__init__ = _original  # type: ignore[method-assign]


def _redirecting(original: Callable[..., None]) -> Callable[..., None]:
    """Returns a constructor for torch's class that builds fastddp's class inside a block."""

    # `__new__` would be the wrong place: pickle and copy call it too, for instances of torch's
    # class; and deleting an assigned `__new__` does not bring a class back to its first state.
    @functools.wraps(original)
    def __init__(self: TorchDDP, *args: Any, **kwargs: Any) -> None:
        if type(self) is TorchDDP and _depth.get() > 0:
            self.__class__ = DistributedDataParallel  # while the instance is still empty
            self.__init__(*args, **kwargs)  # type: ignore[misc]
        else:
            original(self, *args, **kwargs)

    return __init__
