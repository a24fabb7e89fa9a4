"""How a model starts: checked, compared with the other ranks', and given rank 0's values."""

from __future__ import annotations

from functools import partial

import torch

from fastddp import config
from fastddp.comm.broadcast import broadcast_tensors
from fastddp.comm.labels import number_models
from fastddp.ddp.agreement import agree_on_module, check_module
from fastddp.ddp.mixed_precision import cast_buffers
from fastddp.ddp.model import Model
from fastddp.ddp.options import Options
from fastddp.ddp.ranks import Ranks
from fastddp.engine.choose import choose


def start(model: Model, ranks: Ranks, options: Options) -> None:
    """Checks the model and, unless ``init_sync`` is off, gives every rank rank 0's values.

    Collective then: first the ranks' models are compared.

    Args:
        model: this rank's model, which gets the name that all ranks call it by.
        ranks: the ranks that wrap it.
        options: the arguments with which it is wrapped.

    Raises:
        ValueError, RuntimeError: if the model cannot be wrapped here.
        MismatchError: on every rank, if the models differ or another rank's cannot be wrapped.
    """
    checks = partial(check, model, ranks, options)
    if ranks.alone or not options.init_sync:
        checks()
    else:
        agree_on_module(ranks.live_group, model.module, options.to_agree_on(), checks)
        broadcast_model(model, ranks, with_buffers=options.init_sync_buffers)
    if not ranks.alone:
        model.owner = number_models(ranks.live_group, model.module, options.init_sync)
    mixed = options.mixed_precision
    if mixed is not None and mixed.buffer_dtype is not None:
        cast_buffers(model.module, mixed.buffer_dtype)


def check(model: Model, ranks: Ranks, options: Options) -> None:
    """Checks on this rank alone that the model, the options and the environment are fit.

    Raises:
        ValueError, RuntimeError: if one of them is not.
    """
    sends_buffers = not ranks.alone and (
        options.forward_sync_buffers or (options.init_sync and options.init_sync_buffers)
    )
    check_module(model.module, sends_buffers=sends_buffers)
    choose(options.engine)
    config.keep_memory()
    config.shm()


def broadcast_model(
    model: Model,
    ranks: Ranks,
    root: int = 0,
    *,
    with_buffers: bool = True,
    call: str = "wrapping a model",
) -> None:
    """Gives every rank the parameters, and buffers, of rank ``root`` of the group. Collective.

    Args:
        model: this rank's model, whose tensors are written in place.
        ranks: the ranks that have a copy of it.
        root: the rank, within the group, that has the values; the same on every rank.
        with_buffers: whether buffers are sent too, or the parameters alone.
        call: what the script has called, for messages.
    """
    if ranks.alone:
        return
    tensors: list[torch.Tensor] = [*model.parameters()]
    if with_buffers:
        tensors += model.buffers().values()
    what = f"{call}: the broadcast of {len(tensors)} parameters and buffers"
    broadcast_tensors(ranks.live_group, tensors, root, what)
