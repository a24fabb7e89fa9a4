"""`wrap`: decides group, device and class of the wrapper, once."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import nn

from fastddp.comm.environment import find_cuda_device, find_local_rank
from fastddp.ddp.agreement import report_failure
from fastddp.ddp.transparent import TransparentDataParallel, class_for
from fastddp.ddp.wrapper import DistributedDataParallel


def wrap(
    model: nn.Module, *, device: torch.device | str | int | None = None, **options: Any
) -> DistributedDataParallel:
    """Makes a model train data-parallel and otherwise leaves it what it is.

    Works under torchrun, srun and mpirun (docs/launching.md), in processes started by
    :func:`fastddp.spawn` or ``torch.multiprocessing.spawn``, and in a plain ``python`` process,
    whose world it is alone. Makes the default process group when a launcher's environment describes
    one and there is none yet. Every rank starts with rank 0's parameters and buffers. Collective,
    unless ``init_sync`` is False, so all ranks wrap their models in the same order, in one thread.

    Args:
        model: the model to be trained. Use the result in place of it: attributes, methods and
            checkpoint keys are the same.
        device: the device to which the model is moved: by default ``cuda:LOCAL_RANK`` if there is
            one and the model is on the CPU, else the model stays. On a GPU, the inputs of
            ``forward`` are moved too.
        **options: the options of :class:`fastddp.DistributedDataParallel`.

    Returns:
        A :class:`fastddp.DistributedDataParallel` that stands in for the model.

    Raises:
        TypeError: if the model is not a module, or an option is unknown.
        ValueError: if the model or an option is unfit, or the model is wrapped already.
        RuntimeError: if the environment describes half a process group, there is no GPU for the
            local rank, or no parameter requires a gradient.
        fastddp.MismatchError: on every rank, if the ranks' models differ.

    Example::

        model = fastddp.wrap(Model())
        optimizer = torch.optim.AdamW(model.parameters())
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss_of(model(inputs), targets).backward()
            optimizer.step()
    """
    # First: it may be what makes LOCAL_RANK's device the current one.
    group = TransparentDataParallel._find_group(
        options.get("process_group"), options.get("device_mesh")
    )
    try:
        _check(model, options)
        target = torch.device(device) if device is not None else choose_device(model)
        if target is not None and not _on_meta(model):
            model.to(target)
            if target.type != "cpu":
                options.setdefault("device_ids", [target])
    except Exception as error:
        if options.get("init_sync", True):  # ranks with better arguments would wait for this one
            report_failure(group, error)
        raise
    return class_for(model)(model, **options)


def choose_device(model: nn.Module) -> torch.device | None:
    """Returns the device to which `wrap` moves a model unless it is told; None if the model stays.

    Raises:
        RuntimeError: if this process sees no GPU for its local rank.
    """
    if not torch.cuda.is_available() or any(p.device.type != "cpu" for p in model.parameters()):
        return None
    local_rank = find_local_rank()
    if local_rank is None:
        return torch.device("cuda", torch.cuda.current_device())
    index = find_cuda_device(local_rank)
    if index is None:
        raise RuntimeError(
            f"fastddp.wrap: no GPU for local rank {local_rank}: this process sees"
            f" {torch.cuda.device_count()}. Start no more ranks on a host than it has GPUs, or show"
            " each rank its own (CUDA_VISIBLE_DEVICES), or pass device='cpu'"
        )
    return torch.device("cuda", index)


def _on_meta(model: nn.Module) -> bool:
    return any(param.is_meta for param in model.parameters())


def _check(model: object, options: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastddp.wrap: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"fastddp.wrap: this {type(model).__name__} is data-parallel already; wrap its .module"
        )
    known = list(inspect.signature(DistributedDataParallel.__init__).parameters)
    known = [name for name in known if name not in ("self", "module")]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"
            raise TypeError(f"fastddp.wrap: unknown option {name!r}; {hint}")
