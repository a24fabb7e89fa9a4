"""One rank's copy of a model in a group of copies: what keeps it equal to the others."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp import engine as engines
from fastddp.agreement import agree_on_module, check_module, ignored_names
from fastddp.collectives import BroadcastBuffer, broadcast_tensors
from fastddp.engine.python import RoundStats
from fastddp.logging_data import logging_data
from fastddp.options import Options
from fastddp.outputs import tensors_in
from fastddp.plan import BucketPlan

_BROADCAST_BUCKET_BYTES = 250 * 1024 * 1024
"""What torch's class tells those who broadcast a module's state themselves."""


class _TorchReducer:
    """What frameworks call on torch's reducer by its private names; there is nothing to do."""

    def prepare_for_forward(self) -> None: ...

    def prepare_for_backward(self, outputs: list[torch.Tensor]) -> None: ...

    def _rebuild_buckets(self) -> bool:
        return False


class Replica:
    """Starts equal to rank 0's, and stays equal: gradients by a reducer, buffers by broadcast.

    Args:
        module: the model itself.
        group: the ranks that have a copy, or None for a world of one process.
        options: see there.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None, options: Options) -> None:
        self.options = options
        self._module = module
        # Weak: whoever frees a process group last joins its threads, and must not hold the GIL.
        self._group = weakref.ref(group) if group is not None else None
        self._alone = group is None or group.size() == 1
        self._sync = True
        self._sync_buffers_next = True
        self._reducer: engines.Reducer | None = None
        self._packed_buffers: BroadcastBuffer | None = None
        self._hooked: list[tuple[nn.Parameter, torch.dtype, torch.device]] = []

    # ---- once ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Checks the module and, unless `init_sync` is off, gives every rank rank 0's values.

        Collective then: first the ranks' modules are compared.

        Raises:
            ValueError, RuntimeError: if the module is unfit.
            MismatchError: on every rank, if the modules differ or another rank's is unfit.
        """
        if self._alone or not self.options.init_sync:
            self._check()
            return
        group = self.group
        assert group is not None
        agree_on_module(group, self._module, self.options.caps_bytes, self._check)
        ignored = ignored_names(self._module)
        params = [p for name, p in self._module.named_parameters() if name not in ignored]
        buffers = self._buffers() if self.options.init_sync_buffers else []
        broadcast_tensors(group, [*params, *buffers])

    def _check(self) -> None:
        check_module(self._module)
        engines.choose(self.options.engine)

    def attach(self) -> None:
        """Hooks the parameters, from now on averaged."""
        if self._alone:
            return
        engine = engines.choose(self.options.engine)
        group = self.group
        assert group is not None
        ignored = ignored_names(self._module)
        named = {
            name: param
            for name, param in self._module.named_parameters()
            if param.requires_grad and name not in ignored
        }
        params = list(named.values())
        self._reducer = engines.make_reducer(
            engine, params, list(named), group, self.options.caps_bytes
        )
        self._reducer.sync = self._sync
        self._hooked = [(param, param.dtype, param.device) for param in params]

    def refresh(self) -> None:
        """Hooks the parameters anew if a conversion gave them another dtype or device.

        Autograd gives a converted parameter a new gradient node, which no hook is on.
        """
        if any((p.dtype, p.device) != (dtype, device) for p, dtype, device in self._hooked):
            self.detach()
            self.attach()

    def detach(self) -> None:
        """Unhooks the parameters, for good."""
        if self._reducer is not None:
            self._reducer.close()

    # ---- every step ------------------------------------------------------------------------------

    @property
    def sync(self) -> bool:
        """Whether a backward that begins now averages gradients."""
        return self._sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self._sync = value
        if self._reducer is not None:
            self._reducer.sync = value

    def before_forward(self) -> None:
        """Gives every rank rank 0's buffers, unless the forward before was not synchronised."""
        if self._alone or not (self.options.forward_sync_buffers and self._sync_buffers_next):
            return
        buffers = self._buffers()
        if not buffers:
            return
        group = self.group
        if group is None:
            raise RuntimeError(
                "fastddp: the process group of this model was destroyed before its forward; call"
                " destroy_process_group() after the last one, or run model.module instead"
            )
        if self._packed_buffers is None or not self._packed_buffers.serves(buffers):
            self._packed_buffers = BroadcastBuffer(buffers)
        self._packed_buffers.broadcast(group)

    def after_forward(self, output: object) -> None:
        """Takes note of where backward will come from, and whether it may be synchronised."""
        self._sync_buffers_next = torch.is_grad_enabled() and self._sync
        if self._reducer is not None and torch.is_grad_enabled():
            self._reducer.watch(list(tensors_in(output)))

    def _buffers(self) -> list[torch.Tensor]:
        # Looked up anew each time: modules replace their buffers by assignment.
        ignored = ignored_names(self._module)
        return [b for name, b in self._module.named_buffers() if name not in ignored]

    # ---- facts -----------------------------------------------------------------------------------

    @property
    def group(self) -> ProcessGroup | None:
        """The group; None for a world of one, and after the group was destroyed."""
        return self._group() if self._group is not None else None

    def stats(self) -> engines.Stats:
        return self._reducer.stats() if self._reducer is not None else RoundStats()

    def plan(self) -> BucketPlan:
        return self._reducer.plan() if self._reducer is not None else BucketPlan(())

    @property
    def torch_attributes(self) -> dict[str, Any]:
        """What torch's class keeps in public attributes, for tools that read them."""
        device = next(self._module.parameters()).device
        options = self.options
        return options.unused | {
            "device": device,
            "device_type": device.type,
            "device_ids": [d.index for d in options.device_ids] or None,
            "output_device": options.output_device,
            "is_multi_device_module": False,
            "forward_sync_buffers": options.forward_sync_buffers,
            "require_forward_param_sync": self._sync_buffers_next,
            "parameters_to_ignore": set(ignored_names(self._module)),
            "modules_buffers": self._buffers(),
            "bucket_bytes_cap": options.caps_bytes[-1],
            "broadcast_bucket_size": _BROADCAST_BUCKET_BYTES,
            "logger": None,
            "mixed_precision": None,
            "reducer": _TorchReducer(),
        }

    def logging_data(self) -> dict[str, Any]:
        """Returns the entries of torch's logging data that have a meaning here."""
        return logging_data(
            self._module, self.group, self.options, self.plan(), self.stats().rounds
        )
