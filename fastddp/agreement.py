"""Whether the ranks of a group wrap the same model, found out before any of them relies on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp.collectives import gather_if_different
from fastddp.errors import MismatchError

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
)


class _Item(NamedTuple):
    """One thing that all ranks must have alike."""

    name: str
    value: str


class _Problem(NamedTuple):
    """What a rank sends instead of its items when it cannot wrap its model at all."""

    text: str


def ignored_names(module: nn.Module) -> frozenset[str]:
    """Returns the parameters and buffers that the module asks data parallelism to leave alone."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def check_module(module: nn.Module) -> None:
    """Checks that the module can be wrapped here.

    Raises:
        ValueError: if parameters are on `meta` or on several devices, or one that requires a
            gradient has a dtype that cannot be averaged.
        RuntimeError: if a parameter is not initialised yet, or none requires a gradient.
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
        devices.setdefault(param.device, name)
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


def agree_on_module(
    group: ProcessGroup, module: nn.Module, settings: Mapping[str, str], check: Callable[[], None]
) -> None:
    """Checks the module here and compares it with the other ranks'.

    Args:
        group: the ranks.
        module: this rank's.
        settings: what else must be alike, by name.
        check: raises ValueError or RuntimeError if it cannot be wrapped here.

    Raises:
        MismatchError: on every rank, when they differ; names ranks, item and both values. Also when
            another rank could not wrap its own.
        ValueError, RuntimeError: what ``check`` said.
    """
    try:
        check()
    except (ValueError, RuntimeError) as error:
        report_failure(group, error)
        raise
    by_rank = gather_if_different(group, list(_describe(module, settings)))
    if by_rank is not None:
        raise MismatchError(_explain(by_rank))


def report_failure(group: ProcessGroup | None, error: Exception) -> None:
    """Tells ranks that are in :func:`agree_on_module` that this one cannot wrap its model."""
    if group is not None and group.size() > 1:
        gather_if_different(group, _Problem(f"{type(error).__name__}: {error}"))


def _describe(module: nn.Module, settings: Mapping[str, str]) -> Iterator[_Item]:
    ignored = ignored_names(module)
    yield from (_Item(name, value) for name, value in settings.items())
    for kind, tensors in (
        ("parameter", module.named_parameters()),
        ("buffer", module.named_buffers()),
    ):
        for name, tensor in tensors:
            if name not in ignored:
                grad = ", requires grad" if tensor.requires_grad else ""
                yield _Item(
                    f"{kind} '{name}'",
                    f"shape {tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}{grad}",
                )


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
    raise AssertionError("equal descriptions had different digests")


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
