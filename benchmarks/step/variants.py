"""The table of the variants that are compared. A new variant is one more line in VARIANTS.

Every function is at module level and every option is in a `partial`, because variants are pickled
on their way to the ranks. Annotations are not postponed in this file, because torch compares those
of a hook as objects.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the "fake" backend
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP


class Groups(NamedTuple):
    """The process groups that a variant may use. Each has all ranks."""

    real: dist.ProcessGroup
    silent: dist.ProcessGroup  # every collective returns at once and moves no data


Wrap = Callable[[nn.Module, Groups], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One way of training a module.

    Attributes:
        name: the name in the command line and in records.
        wrap: the function that wraps a module for training.
        synchronises: whether the gradients must equal those of the reference. The values of other
            variants are not checked; they are there for comparison only.
        twin: the name of the variant that does the same work without the communication.
        keeps_memory: whether the steps run with fastddp's allocator, which keeps the memory of
            large tensors. All other variants run with torch's own allocator.
    """

    name: str
    wrap: Wrap
    synchronises: bool = True
    twin: str | None = None
    keeps_memory: bool = False


NOSYNC, TORCH, TORCH_NOOP = "nosync", "torch", "torch-noop"
TORCH_VARIANTS = (TORCH, "torch-view", "torch-static")


def leave(module: nn.Module, _groups: Groups) -> nn.Module:
    return module


def torch_ddp(
    module: nn.Module, groups: Groups, *, view: bool = False, static: bool = False
) -> nn.Module:
    return TorchDDP(
        module,
        process_group=groups.real,
        gradient_as_bucket_view=view,
        static_graph=static,
        find_unused_parameters=_has_unused(module) and not static,
    )


def torch_silent(module: nn.Module, groups: Groups, *, view: bool = False) -> nn.Module:
    """Torch's reducer, with every bucket finished as soon as it is full.

    The hook is needed because the future of a silent group has no tensors, which torch's own path
    requires.
    """
    ddp = TorchDDP(
        module,
        process_group=groups.silent,
        gradient_as_bucket_view=view,
        find_unused_parameters=_has_unused(module),
    )
    ddp.register_comm_hook(None, _return_at_once)
    return ddp


def _has_unused(module: nn.Module) -> bool:
    """Returns whether torch's class has to be told that a step leaves out parameters."""
    return getattr(module, "has_unused", False)


def _return_at_once(
    state: None,  # noqa: ARG001 - torch checks the parameters' names
    bucket: dist.GradBucket,
) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def fast_ddp(module: nn.Module, groups: Groups, *, engine: str, silent: bool = False) -> nn.Module:
    import fastddp

    group = groups.silent if silent else groups.real
    return fastddp.DistributedDataParallel(module, process_group=group, engine=engine)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(NOSYNC, leave, synchronises=False),
        Variant(TORCH, torch_ddp, twin=TORCH_NOOP),
        Variant("torch-view", partial(torch_ddp, view=True), twin="torch-view-noop"),
        Variant("torch-static", partial(torch_ddp, view=True, static=True), twin="torch-view-noop"),
        Variant(TORCH_NOOP, torch_silent, synchronises=False),
        Variant("torch-view-noop", partial(torch_silent, view=True), synchronises=False),
        Variant("fastddp", partial(fast_ddp, engine="native"), twin="fastddp-noop"),
        Variant(
            "fastddp-noop", partial(fast_ddp, engine="native", silent=True), synchronises=False
        ),
        Variant("fastddp-python", partial(fast_ddp, engine="python")),
        Variant("nosync-kept", leave, synchronises=False, keeps_memory=True),
        Variant("torch-kept", torch_ddp, keeps_memory=True),
        Variant("fastddp-kept", partial(fast_ddp, engine="native"), keeps_memory=True),
    )
}


def keep_memory(on: bool) -> None:
    """Turns fastddp's allocator on or off, which wrapping a model may have turned on."""
    if importlib.util.find_spec("fastddp") is None:
        return
    from fastddp import extension

    native = extension.load()
    if native is not None and native.keep_memory(on) != on:
        raise RuntimeError("another library has given torch an allocator for CPU tensors")


def available() -> list[str]:
    """Returns the names of all variants that this installation can run."""
    missing: set[str] = set()
    kept = {name for name, variant in VARIANTS.items() if variant.keeps_memory}
    if importlib.util.find_spec("fastddp") is None:
        missing |= {name for name in VARIANTS if name.startswith("fastddp")} | kept
    elif importlib.util.find_spec("fastddp._C") is None:
        missing |= {"fastddp", "fastddp-noop"} | kept
    return [name for name in VARIANTS if name not in missing]
