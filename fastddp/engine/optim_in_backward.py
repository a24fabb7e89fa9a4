"""Optimizers that parameters brought along, by torch's ``_apply_optimizer_in_backward``.

They step when a gradient has been accumulated, which here is too early: it is not averaged yet. So
their hooks are taken off, and they step at the end of the round instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn


def take_over(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Takes the optimizers' hooks off the parameters; returns those that have an optimizer."""
    owners = [param for param in params if hasattr(param, "_in_backward_optimizers")]
    module = sys.modules.get("torch.distributed.optim.apply_optimizer_in_backward")
    if module is not None:
        for param in owners:
            for handle in module.param_to_optim_hook_handle_map.get(param, []):
                handle.remove()
    return owners


def step(params: Iterable[nn.Parameter]) -> None:
    """Steps the optimizers of those that have a gradient, and drops it, as torch's hooks do."""
    for param in params:
        if param.grad is not None:
            for optimizer in param._in_backward_optimizers:  # type: ignore[attr-defined]
                optimizer.step()
            param.grad = None
