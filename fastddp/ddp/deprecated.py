"""Warnings of arguments that the installed torch's class warns of."""

from __future__ import annotations

import inspect
import sys
import warnings

from torch.nn.parallel import DistributedDataParallel as TorchDDP


def warn_of_deprecated(
    broadcast_buffers: bool | None, forward_sync_buffers: bool | None, check_reduction: bool
) -> None:
    """Warns of arguments that the installed torch's class warns of, where the caller stands."""
    if check_reduction:
        _warn("check_reduction is deprecated in torch's class and changes nothing; leave it out")
    if broadcast_buffers is None or not _torch_has_forward_sync_buffers():
        return
    if forward_sync_buffers is not None:
        _warn(
            "broadcast_buffers is deprecated in torch's class, and ignored where"
            " forward_sync_buffers is given too; leave it out"
        )
    else:
        _warn(
            "broadcast_buffers is deprecated in torch's class; use forward_sync_buffers instead,"
            " with which buffers are still made equal at the start"
        )


def _torch_has_forward_sync_buffers() -> bool:
    return "forward_sync_buffers" in inspect.signature(TorchDDP.__init__).parameters


def _warn(text: str) -> None:
    """Gives a FutureWarning whose place is the first caller outside of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastddp."):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fastddp: {text}", FutureWarning, stacklevel=level)
