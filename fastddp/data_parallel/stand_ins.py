"""Stand-ins: the tensors that replicas have in place of a module's parameters.

On the parameter's own device a stand-in shares the parameter's memory; on another device it is a
copy. Its gradient goes to the parameter through a node of the graph, a
:class:`fastddp.data_parallel.fan.Fan`. With copies, one fan serves a whole bucket of parameters, so
that their gradients come from each device in one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddp.data_parallel.fan import Fan
from fastddp.data_parallel.packing import fused_copies, has_plain_memory
from fastddp.device.flat import DTYPES
from fastddp.engine.plan import MiB, ParamSpec, plan_buckets

_BUCKET_BYTES = 25 * MiB


class StandIns(NamedTuple):
    """For each device one tensor for each parameter.

    It is never changed, only replaced as a whole, so that threads need no lock.

    Attributes:
        params: the parameters themselves, held so that no other tensor can get the same id.
        keys: for each parameter, a description that changes when its stand-ins are out of date.
        devices: the devices, one per replica.
        nodes: for each parameter, the graph node of its stand-ins; None for one without a gradient.
        tensors: for each device, the stand-ins of all parameters.
    """

    params: tuple[Tensor, ...]
    keys: list[object]
    devices: tuple[torch.device, ...]
    nodes: list[object]
    tensors: list[list[Tensor]]

    @classmethod
    def of(cls, params: Sequence[Tensor], devices: Sequence[torch.device]) -> StandIns:
        """Makes stand-ins for parameters.

        Args:
            params: the parameters, all on the first of the devices.
            devices: the devices, one per replica; one device may appear several times.
        """
        keys, copied = _keys(params, devices), _copied(devices)
        tensors = [list(params) for _ in devices]
        # The first step may run without gradients; its stand-ins serve the later steps too.
        with torch.inference_mode(False), torch.enable_grad():
            others = [index for index, is_copied in enumerate(copied) if is_copied]
            copies = fused_copies(params, [devices[index] for index in others])
            for index, copy in zip(others, copies, strict=True):
                tensors[index] = copy
            for bucket in _buckets(params, any(copied)):
                own = [[row[index] for index in bucket] for row in tensors]
                fan = Fan.apply(own, *own[0])  # type: ignore[no-untyped-call]
                for nth, index in enumerate(bucket):
                    for row, stand_in in zip(tensors, fan[nth :: len(bucket)], strict=True):
                        row[index] = stand_in
        nodes: list[object] = [stand_in.grad_fn for stand_in in tensors[0]]
        return cls(tuple(params), keys, tuple(devices), nodes, tensors)

    def serve(self, params: Sequence[Tensor], devices: Sequence[torch.device]) -> bool:
        """Returns whether these are up to date for these parameters, on at least these devices."""
        return (
            self.devices[: len(devices)] == tuple(devices)
            and self.keys == _keys(params, self.devices)
            and self._untouched()
        )

    def _untouched(self) -> bool:
        """Returns whether no forward wrote to these.

        A write that autograd recorded has put that step's graph between a stand-in and the
        parameter. A write to a copy must not last beyond its step.
        """
        return all(
            tensor.grad_fn is node and not (is_copied and tensor._version)
            for is_copied, tensors in zip(_copied(self.devices), self.tensors, strict=True)
            for tensor, node in zip(tensors, self.nodes, strict=True)
        )


def _copied(devices: Sequence[torch.device]) -> list[bool]:
    """Returns, for each replica, whether it has copies instead of the parameters' own memory."""
    return [device != devices[0] for device in devices]


def _keys(params: Sequence[Tensor], devices: Sequence[torch.device]) -> list[object]:
    """Returns, for each parameter, a description of everything that its stand-ins depend on.

    Where all replicas share a parameter's memory, that is its place in memory. With copies it is
    its version too, which every write through the tensor raises. A write through `.data` does not
    raise it.
    """
    if not any(_copied(devices)):
        return [_place(param) for param in params]
    return [(*_place(param), _version(param)) for param in params]


def _place(param: Tensor) -> tuple[object, ...]:
    place = (param.data_ptr(), param.shape, param.stride(), param.dtype)
    return (id(param), param.requires_grad, *place)


def _version(param: Tensor) -> object:
    # An inference tensor has no version. A new object equals no other, so it counts as changed.
    return object() if param.is_inference() else param._version


def _buckets(params: Sequence[Tensor], copied: bool) -> list[list[int]]:
    """Returns the groups of parameters that share a fan, as lists of indices.

    A fan runs once the last gradient of its parameters has arrived, so hooks of the other
    parameters have to wait. Without copies there is no transfer to save, so there each parameter
    has a fan of its own.

    Buckets are filled in reverse order of the parameters, as in Li et al., "PyTorch Distributed:
    Experiences on Accelerating Data Parallel Training", VLDB 2020.

    Args:
        params: the parameters of the module.
        copied: whether a replica is on another device.
    """
    together = [
        index
        for index, param in enumerate(params)
        if copied and param.requires_grad and has_plain_memory(param) and param.dtype in DTYPES
    ]
    alone = sorted(set(range(len(params))) - set(together))
    specs = [ParamSpec.of(params[index]) for index in together]
    # Gradients arrive roughly in the reverse order of the parameters.
    plan = plan_buckets(specs, list(reversed(range(len(specs)))), [_BUCKET_BYTES])
    buckets = [[together[slot.param] for slot in bucket.slots] for bucket in plan.buckets]
    return [*buckets, *([index] for index in alone)]
