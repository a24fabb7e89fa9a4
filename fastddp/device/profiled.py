"""Ranges in torch's profiles; without a profiler they cost next to nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

_NOTHING = nullcontext()


def profiled(name: str) -> AbstractContextManager[object]:
    """Returns a context that a profile shows under this name, if one is being made."""
    return record_function(name) if _profiler_enabled() else _NOTHING
