"""When optimizers step: events of all of them, by torch's global hooks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fastddp.watch.events import Kind, record


@functools.cache
def watch_optimizers() -> None:
    """Has each step of each optimizer in this process recorded, once and for all.

    Not those that torch.compile has compiled: in a graph there is nothing to record.
    """
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        record(Kind.OPTIMIZER_BEGIN)


def _after(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        record(Kind.OPTIMIZER_END)
