"""Named ranges in torch's profiles. Without a profiler they cost almost nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

_NOTHING = nullcontext()


def profiled(name: str) -> AbstractContextManager[object]:
    """Returns a context manager for a range that a profile shows under this name."""
    return record_function(name) if _profiler_enabled() else _NOTHING
