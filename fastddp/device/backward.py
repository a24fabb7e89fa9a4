"""Callbacks for two moments: backward reaches an output of forward, and backward is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from fastddp.device.compiler import untraced


def in_backward() -> bool:
    """Returns whether this thread is running a part of a backward."""
    return bool(torch._C._current_graph_task_id() != -1)


def wait_until(done: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Waits until another thread has done something, unless this thread is inside a backward.

    Inside a backward it does not wait, because this thread may itself be needed to finish it.

    Args:
        done: a function that returns whether the thing has been done. It is called repeatedly.
        timeout_s: the longest wait in seconds.

    Returns:
        False if ``timeout_s`` passed without it, else True.
    """
    if done() or in_backward():
        return True
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(50e-6)
    return done()


def on_backward(outputs: Iterable[torch.Tensor], begin: Callable[[], None]) -> None:
    """Has a function called whenever a backward reaches one of these tensors.

    Args:
        outputs: the tensors that a forward returned. Those without a graph are passed over.
        begin: the function to call, once for each tensor that is reached.
    """

    @untraced
    def hook(_: torch.Tensor) -> None:
        begin()

    for output in outputs:
        if output.requires_grad and not output.is_leaf:
            output.register_hook(hook)


def at_end_of_backward(end: Callable[[bool], None]) -> None:
    """Has a function called when the backward that is running now is over.

    Inside a backward that a re-entrant checkpoint runs, this means the inner one.

    Args:
        end: the function to call: with True, after all functions that were registered before it,
            or with False if backward raised. With False it is called by a destructor, so an
            exception that it raises then is lost.
    """
    torch.autograd.Variable._execution_engine.queue_callback(_End(end))


class _End:
    """An entry in autograd's list of callbacks: called at the end, or dropped if backward raised.

    Autograd does not call its callbacks after an exception, it only drops them. So the destructor
    is the one place that hears of the exception.
    """

    def __init__(self, end: Callable[[bool], None]) -> None:
        self._end: Callable[[bool], None] | None = end

    @untraced
    def __call__(self) -> None:
        end, self._end = self._end, None
        assert end is not None
        end(True)

    @untraced
    def __del__(self) -> None:
        if self._end is not None:
            self._end(False)
