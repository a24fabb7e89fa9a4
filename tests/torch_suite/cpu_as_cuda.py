"""CPU memory under the name of a CUDA device, so that code written for GPUs runs without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from tests.torch_suite.sync_batch_norm import KERNELS, forward


class _CpuAsCuda(TorchFunctionMode):
    """Reads every mention of a CUDA device, as text, object or number, as the CPU."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], int):
            args = (args[0], "cpu", *args[2:])
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = "cpu"
        return func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value


class _InOrder:
    """A device, stream or event where all runs at once and in order: nothing to set or wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _InOrder:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self, *_: Any, **__: Any) -> None: ...

    record = synchronize = wait_stream = wait_event = wait


def _in_order(*names: str) -> dict[str, Any]:
    """Makes a class for each name: torch.compile wants no object of torch's to have two names."""
    return {name: type(name, (_InOrder,), {}) for name in names}


@contextlib.contextmanager
def cpu_as_cuda(num_devices: int) -> Iterator[None]:
    """Lets the body name `num_devices` CUDA devices; all of them are the CPU.

    `torch.cuda.is_available()` stays false, so that code which asks takes its CPU path.
    """

    stand_ins: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "device_count": lambda: num_devices,
            "current_device": lambda: 0,
            **_in_order("device", "set_device", "stream", "Stream", "synchronize", "manual_seed"),
        },
        torch.accelerator: _in_order("current_stream"),
        torch: _in_order("Stream", "Event") | KERNELS,
        torch.nn.SyncBatchNorm: {"forward": forward},
    }
    parse_to = torch._C._nn._parse_to  # of `Module.to`; out of reach for a function mode

    def parse_to_cpu(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], int):
            args = ("cpu", *args[1:])
        args = tuple(map(_on_cpu, args))
        return parse_to(*args, **{name: _on_cpu(value) for name, value in kwargs.items()})

    with contextlib.ExitStack() as stack:
        for module, by_name in stand_ins.items():
            for name, stand_in in by_name.items():
                stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(mock.patch.object(torch._C._nn, "_parse_to", parse_to_cpu))
        stack.enter_context(_CpuAsCuda())
        yield
