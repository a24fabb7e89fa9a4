"""Optimizers that torch's ``_apply_optimizer_in_backward`` has attached to parameters.

Their hooks step when a gradient has been accumulated. That is too early here, since the gradient is
not averaged yet. So the hooks are removed, and the optimizers step at the end of the round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn


def take_over(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Removes the optimizers' hooks; returns the parameters that have an optimizer."""
    owners = [param for param in params if hasattr(param, "_in_backward_optimizers")]
    module = sys.modules.get("torch.distributed.optim.apply_optimizer_in_backward")
    if module is not None:
        for param in owners:
            for handle in module.param_to_optim_hook_handle_map.get(param, []):
                handle.remove()
    return owners


def step(params: Iterable[nn.Parameter]) -> None:
    """Steps the optimizer of each parameter with a gradient, and drops it, as torch's hooks do."""
    for param in params:
        if param.grad is not None:
            for optimizer in param._in_backward_optimizers:  # type: ignore[attr-defined]
                optimizer.step()
            param.grad = None
