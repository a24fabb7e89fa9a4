"""`patch`: code that says `torch.nn.parallel.DistributedDataParallel` gets fastddp's class.

Frameworks make the wrapper themselves, and many bound torch's class to a name of their own when
they were imported. So no name is replaced: torch's class stays torch's class wherever it is, with
every `isinstance` check and every pickled reference, but *constructing* it inside a block makes an
instance of ours, which is a subclass.

Whether a construction is inside a block is a matter of its own thread and context, not of the
process. Else a thread that wraps a model while another one's block happens to be open would get our
class on one rank and torch's on the next, and the two do not talk to each other.
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
"""How many blocks the running code is in."""


def patch() -> _Patch:
    """Makes torch's ``DistributedDataParallel`` construct fastddp's, inside a block or a function.

    For code that wraps the model itself: a framework, or a script that stays what it is. Only
    constructions of exactly torch's class, in this thread, are redirected, whatever name the code
    knows the class by; subclasses of it, other threads and processes started inside are not. At the
    end of the last block torch's class is as it was; models that were wrapped stay ours.

    Returns:
        A context manager that may be entered repeatedly and nested. As a decorator it opens a block
        for each call. Nothing happens before; one that is dropped without use gives a
        RuntimeWarning.

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
        self._used = True  # at each call of the function
        return super().__call__(func)

    def __del__(self) -> None:
        # `fastddp.patch()` on a line of its own looks as if it did something.
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
        # Someone else may have wrapped the constructor since: theirs stays, and calls ours, which
        # outside of a block only calls the original.
        if _open_blocks == 0 and TorchDDP.__init__ is _installed:
            TorchDDP.__init__ = _original  # type: ignore[method-assign]


def _redirecting(original: Callable[..., None]) -> Callable[..., None]:
    """Returns a constructor of torch's class that builds ours inside a block."""

    # Not `__new__`, which pickle and copy call too, for instances that are torch's; and CPython
    # does not restore a class from which an assigned `__new__` is deleted.
    @functools.wraps(original)
    def __init__(self: TorchDDP, *args: Any, **kwargs: Any) -> None:
        if type(self) is TorchDDP and _depth.get() > 0:
            self.__class__ = DistributedDataParallel  # before there is anything in it
            self.__init__(*args, **kwargs)  # type: ignore[misc]
        else:
            original(self, *args, **kwargs)

    return __init__
