"""Whether the ranks of a group wrap the same model: checked before any of them relies on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp.comm.objects import gather_if_different
from fastddp.ddp.model import ignored_names, sparse_parameters
from fastddp.errors import MismatchError

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
)

_CALL = "wrapping a model: the comparison of the ranks' models"
_PROBLEM = "problem"
_MAX_PROBLEM_CHARS = 10_000


class _Item(NamedTuple):
    """One thing that must be the same on all ranks."""

    name: str
    value: str


class _Problem(NamedTuple):
    """What a rank sends instead of its items when it cannot wrap its model at all."""

    text: str


def check_module(module: nn.Module, *, sends_buffers: bool) -> None:
    """Checks that the module can be wrapped here.

    Args:
        module: the module to be wrapped.
        sends_buffers: whether ranks are to be given the values of rank 0's buffers.

    Raises:
        ValueError: if parameters are on `meta` or on several devices, or one that requires a
            gradient has a dtype that cannot be averaged, or a parameter or buffer is not a strided
            tensor and cannot be sent.
        RuntimeError: if a parameter is not initialised yet, or no parameter requires a gradient.
    """
    ignored = ignored_names(module)
    params = [(name, p) for name, p in module.named_parameters() if name not in ignored]
    devices: dict[torch.device, str] = {}
    for name, param in params:
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise RuntimeError(
                f"fastddp: parameter '{name}' is uninitialized; run a dummy forward pass first"
            )
        if param.device.type == "meta":
            raise ValueError(
                f"fastddp: parameter '{name}' is on the meta device and has no values; call"
                " model.to_empty(device=...) and initialise it first"
            )
        if param.requires_grad and param.dtype not in _DTYPES:
            raise ValueError(
                f"fastddp: parameter '{name}' has dtype {param.dtype}, whose gradients cannot be"
                f" averaged; use one of {', '.join(map(str, _DTYPES))} or requires_grad_(False)"
            )
        check_layout("parameter", name, param)
        devices.setdefault(param.device, name)
    if sends_buffers:
        for name, buffer in module.named_buffers():
            if name not in ignored:
                check_layout("buffer", name, buffer)
    if len(devices) > 1:
        (first, first_name), (second, second_name) = list(devices.items())[:2]
        raise ValueError(
            f"fastddp: parameters are on {len(devices)} devices: '{first_name}' on {first},"
            f" '{second_name}' on {second}; move the model to one device per process"
        )
    if not any(param.requires_grad for _, param in params):
        raise RuntimeError(
            "DistributedDataParallel is not needed when a module doesn't have any parameter that"
            f" requires a gradient ({len(params)} parameters in {type(module).__name__}); wrap it"
            " after requires_grad_(True), or not at all"
        )


def check_layout(kind: str, name: str, tensor: torch.Tensor) -> None:
    """Checks that the values of a parameter or buffer can be sent.

    Args:
        kind: the word "parameter" or "buffer", for the message.
        name: the name of the tensor in the module.
        tensor: the parameter or buffer to be sent.

    Raises:
        ValueError: if the tensor is sparse, nested, quantized or the like.
    """
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else None
        raise ValueError(
            f"fastddp: {kind} '{name}' is a tensor of {what or tensor.layout} values, which cannot"
            " be sent to other ranks; keep it as strided tensors, such as its indices and values,"
            " or put its name into the module's _ddp_params_and_buffers_to_ignore"
        )


def agree_on_module(
    group: ProcessGroup,
    module: nn.Module,
    settings: Mapping[str, str],
    check: Callable[[], None],
    topic: str | None = None,
) -> None:
    """Checks the module here and compares it with the other ranks' modules. Collective.

    Args:
        group: the ranks that have a module to compare.
        module: the module of this rank.
        settings: what else must be the same on all ranks, by name.
        check: a function that raises if the module cannot be wrapped here.
        topic: a name under which the ranks meet in the group's store and not by collectives, see
            :func:`fastddp.comm.objects.gather_if_different`.

    Raises:
        MismatchError: on every rank, if the modules differ; names ranks, item and both values. Also
            if another rank could not wrap its module.
        Exception: the error that ``check`` raised.
    """
    try:
        check()
        mine = list(_describe(module, settings))
    except Exception as error:
        report_failure(group, error, topic)
        raise
    by_rank = gather_if_different(group, mine, _parse, _CALL, topic)
    if by_rank is not None:
        raise MismatchError(_explain(by_rank))


def report_failure(group: ProcessGroup | None, error: Exception, topic: str | None = None) -> None:
    """Tells ranks that are in :func:`agree_on_module` that this one cannot wrap its model.

    Collective in place of that function.

    Args:
        group: the ranks to be told; nobody if it is None or has one rank.
        error: the reason that is sent.
        topic: a name under which the ranks meet in the group's store, if they do.
    """
    if group is not None and group.size() > 1:
        text = f"{type(error).__name__}: {error}"[:_MAX_PROBLEM_CHARS]
        with contextlib.suppress(RuntimeError):  # the error itself says more than one of these
            gather_if_different(group, {_PROBLEM: text}, _parse, _CALL, topic)


def _parse(received: Any) -> list[_Item] | _Problem:
    """Returns what a rank has sent, if it is one of the two.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(received, dict) and isinstance(received.get(_PROBLEM), str):
        return _Problem(received[_PROBLEM][:_MAX_PROBLEM_CHARS])
    if not isinstance(received, list) or not all(_is_pair_of_texts(item) for item in received):
        raise ValueError("expected a list of names and values")
    return [_Item(*item) for item in received]


def _is_pair_of_texts(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(t, str) for t in item)


def _describe(module: nn.Module, settings: Mapping[str, str]) -> Iterator[_Item]:
    ignored, sparse = ignored_names(module), sparse_parameters(module)
    yield from (_Item(name, value) for name, value in settings.items())
    for name, param in module.named_parameters():
        if name not in ignored:
            grad = ", requires grad" if param.requires_grad else ""
            yield _Item(
                f"parameter '{name}'",
                f"shape {tuple(param.shape)}, {param.dtype}, strides {param.stride()}{grad}"
                + (", sparse gradient" if param in sparse else ""),
            )
    for name, buffer in module.named_buffers():
        if name not in ignored:
            shape = "nested" if buffer.is_nested else f"shape {tuple(buffer.shape)}"
            place = ", on meta" if buffer.is_meta else ""
            yield _Item(f"buffer '{name}'", f"{shape}, {buffer.dtype}{place}")


def _explain(by_rank: Sequence[list[_Item] | _Problem]) -> str:
    for rank, items in enumerate(by_rank):
        if isinstance(items, _Problem):
            return f"fastddp: rank {rank} could not wrap its model: {items.text}"
    reference = by_rank[0]
    for rank, items in enumerate(by_rank):
        if items != reference:
            return (
                f"fastddp: rank {rank} and rank 0 do not wrap the same model:"
                f" {_first_difference(rank, items, reference)}. Do all ranks build it alike?"
            )
    raise AssertionError("what differs cannot be equal")


def _first_difference(
    rank: int, items: list[_Item] | _Problem, reference: list[_Item] | _Problem
) -> str:
    mine, theirs = dict(_items(items)), dict(_items(reference))
    for name, value in theirs.items():
        if name not in mine:
            return f"rank 0 has {name} ({value}) and rank {rank} has not"
        if mine[name] != value:
            return f"{name} has {mine[name]} on rank {rank}, {value} on rank 0"
    for name, value in mine.items():
        if name not in theirs:
            return f"rank {rank} has {name} ({value}) and rank 0 has not"
    return f"the same parameters and buffers are registered in another order on rank {rank}"


def _items(description: list[_Item] | _Problem) -> list[_Item]:
    assert isinstance(description, list)
    return description
