"""What tools read from torch's class by names of its own: attributes and the reducer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastddp.plan import MiB

if TYPE_CHECKING:
    from fastddp.replica import Replica


_BROADCAST_BUCKET_BYTES = 250 * 1024 * 1024
"""What torch's class tells those who broadcast a module's state themselves."""


class TorchReducer:
    """What frameworks call on torch's reducer; there is nothing to do."""

    def prepare_for_forward(self) -> None: ...

    def prepare_for_backward(self, outputs: list[torch.Tensor]) -> None: ...

    def _rebuild_buckets(self) -> bool:
        return False

    def _delay_all_reduce(self) -> None: ...


def attributes(replica: Replica) -> dict[str, Any]:
    """Returns what torch's class keeps in attributes."""
    options = replica.options
    buffers = replica.buffers.named()
    return options.unused | {
        "device": replica.device,
        "device_type": replica.device.type,
        "device_ids": [d.index for d in options.device_ids] or None,
        "output_device": options.output_device,
        "is_multi_device_module": False,
        "broadcast_buffers": options.forward_sync_buffers,
        "forward_sync_buffers": options.forward_sync_buffers,
        "require_forward_param_sync": replica.sync_buffers_next,
        "parameters_to_ignore": {*replica.ignored, *replica.delayed},
        "modules_buffers": list(buffers.values()),
        "named_module_buffers": buffers,
        # Not less than the first bucket that torch.compile assumes, or it refuses.
        "bucket_bytes_cap": max(options.caps_bytes[-1], MiB),
        "broadcast_bucket_size": _BROADCAST_BUCKET_BYTES,
        "mixed_precision": options.mixed_precision,
        "logger": None,
        "reducer": TorchReducer(),
        "_has_rebuilt_buckets": replica.stats().rounds > 0,
    }
