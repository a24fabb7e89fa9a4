"""When a backward reaches the outputs of a forward, and when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from fastddp.device.compiler import untraced


def in_backward() -> bool:
    """Returns whether this thread runs a part of a backward."""
    return bool(torch._C._current_graph_task_id() != -1)


def wait_until(done: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Waits for another thread to get something done, unless this one is inside a backward.

    Returns:
        Whether it is done, or not to be waited for; False after ``timeout_s``.
    """
    if done() or in_backward():
        return True
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(50e-6)
    return done()


def on_backward(outputs: Iterable[torch.Tensor], begin: Callable[[], None]) -> None:
    """Has ``begin`` called whenever a backward reaches one of these, once for each of them."""

    @untraced
    def hook(_: torch.Tensor) -> None:
        begin()

    for output in outputs:
        if output.requires_grad and not output.is_leaf:
            output.register_hook(hook)


def at_end_of_backward(end: Callable[[bool], None]) -> None:
    """Has ``end`` called when the backward that runs now is over.

    Within one that a re-entrant checkpoint runs, that is the inner one.

    Args:
        end: called with True after what was asked for before, or with False if backward raised. In
            the latter case it is called by a destructor, and what it raises is lost.
    """
    torch.autograd.Variable._execution_engine.queue_callback(_End(end))


class _End:
    """Lives in the backward's list of callbacks: called at its end, or dropped when it raised."""

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
