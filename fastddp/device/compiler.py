"""Keeps `torch.compile` out of the wrapper's own code, and lets it into the model that it calls.

torch's class is on the compiler's list of files to leave alone. The list is part of the compiler,
whose import takes a second, so the functions here are marked one by one instead. A mark is two
things: an attribute of the function, which the compiler reads before it inlines a call, and a
strategy of its code, which torch's interpreter hook reads before it runs a frame. Without marks the
compiler would trace what waits for other ranks, and its guards would watch what changes each step.

Marks go on plain functions, below any other decorator: they are on the code, and a decorator's is
everybody's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Marks a function that is not to be compiled, nor is anything that it calls."""
    _mark(function, calls_too=True)
    return function


def untraced_itself(function: _Function) -> _Function:
    """Marks a function that is not to be compiled, while what it calls is."""
    _mark(function, calls_too=False)
    return function


def _mark(function: Any, *, calls_too: bool) -> None:
    try:
        from torch._C._dynamo.eval_frame import (
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:  # a torch without this interface: the compiler will try, and cut
        return
    calls = _FrameAction.SKIP if calls_too else _FrameAction.DEFAULT
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, calls))
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "fastddp synchronises ranks here"


def refuse_compiled_autograd() -> None:
    """Raises where backward itself is compiled, which changes when gradients exist.

    Raises:
        NotImplementedError: under `torch._dynamo.config.compiled_autograd`.
    """
    state = sys.modules.get("torch._dynamo.compiled_autograd")  # imported by whoever turns it on
    if state and (state.compiled_autograd_enabled or state.in_compiled_autograd_region):
        raise NotImplementedError(
            "fastddp does not support compiled autograd, nor does torch's DistributedDataParallel;"
            " set torch._dynamo.config.compiled_autograd = False"
        )
