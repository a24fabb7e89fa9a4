"""Keeps `torch.compile` out of the wrapper's own code, and lets it into the model that it calls.

torch's class is on the compiler's list of files to leave alone. That list is part of the compiler,
which takes a second to import, so fastddp's functions are marked one by one instead. A mark has two
parts: an attribute of the function, which the compiler reads before it inlines a call, and a
strategy for the function's code, which torch's interpreter hook reads before it runs a frame.
Without marks the compiler would trace code that waits for other ranks, and its guards would watch
values that change in every step.

Marks go on plain functions, below any other decorator. They belong to the code object, and all
functions that a decorator returns share one code object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Marks a function so that neither it nor anything that it calls is compiled."""
    _mark(function, calls_too=True)
    return function


def untraced_itself(function: _Function) -> _Function:
    """Marks a function so that it is not compiled itself, while the functions that it calls are."""
    _mark(function, calls_too=False)
    return function


def _mark(function: Any, *, calls_too: bool) -> None:
    try:
        from torch._C._dynamo.eval_frame import (
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:  # a torch without this interface; the compiler breaks the graph instead
        return
    calls = _FrameAction.SKIP if calls_too else _FrameAction.DEFAULT
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, calls))
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "fastddp synchronises ranks here"


def refuse_compiled_autograd() -> None:
    """Raises if backward itself is compiled, because gradients then appear at other times.

    Raises:
        NotImplementedError: if `torch._dynamo.config.compiled_autograd` is on.
    """
    # Turning it on imports the module, so there is nothing to import here.
    state = sys.modules.get("torch._dynamo.compiled_autograd")
    if state and (state.compiled_autograd_enabled or state.in_compiled_autograd_region):
        raise NotImplementedError(
            "fastddp does not support compiled autograd, nor does torch's DistributedDataParallel;"
            " set torch._dynamo.config.compiled_autograd = False"
        )
