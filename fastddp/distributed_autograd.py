"""Distributed autograd, torch's backward over RPC, which cannot be combined with this package."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastddp.compiler import untraced


@untraced
def refuse_distributed_autograd() -> None:
    """Raises inside ``torch.distributed.autograd.context()``, when gradients are recorded.

    Such a backward collects gradients in its context instead of ``.grad`` and calls no hook on a
    parameter. They would silently stay this rank's own.

    Raises:
        NotImplementedError: if such a context is active.
    """
    rpc = sys.modules.get("torch.distributed.rpc")
    has_agent = getattr(rpc, "_is_current_rpc_agent_set", None)  # absent in a torch without RPC
    if has_agent is None or not has_agent() or not torch.is_grad_enabled():
        return
    autograd: Any = sys.modules["torch.distributed.autograd"]  # which the one for RPC imports
    try:
        autograd._current_context()
    except RuntimeError:  # there is none
        return
    raise NotImplementedError(
        "fastddp: a forward inside torch.distributed.autograd.context(); gradients of a distributed"
        " backward are not averaged by this package. Use torch's DistributedDataParallel for this"
        " model, or an ordinary backward() outside the context"
    )
