"""The entries of torch's logging data that have a meaning here, under torch's names."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from fastddp.options import Options
from fastddp.plan import BucketPlan


def logging_data(
    module: nn.Module, group: ProcessGroup | None, options: Options, plan: BucketPlan, rounds: int
) -> dict[str, Any]:
    """Returns them as torch does: sizes in bytes, truth values as numbers, lists as text.

    ``can_set_static_graph`` is not there: Lightning would advise to set what changes nothing.

    Args:
        module: the model itself.
        group: its ranks; None for a world of one process.
        options: those it was wrapped with.
        plan: of its buckets, at present.
        rounds: how many times gradients were averaged.
    """
    params = [param for param in module.parameters() if param.requires_grad]
    # What torch calls the size of a bucket is that of its gradients.
    bucket_sizes = ", ".join(
        str(sum(slot.numel for slot in bucket.slots) * bucket.dtype.itemsize)
        for bucket in plan.buckets
    )
    output = options.output_device
    data: dict[str, Any] = {
        "module_name": type(module).__name__,
        "world_size": 1 if group is None else group.size(),
        "rank": 0 if group is None else group.rank(),
        "iteration": rounds,
        "num_parameter_tensors": len(params),
        "total_parameter_size_bytes": sum(param.nbytes for param in params),
        "bucket_cap_bytes": options.caps_bytes[-1],
        "bucket_sizes": bucket_sizes,
        "has_sync_bn": int(any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())),
        "is_multi_device_module": 0,
        "device_ids": ", ".join(str(device.index) for device in options.device_ids),
        "output_device": -1 if output is None or output.index is None else output.index,
        "broadcast_buffers": int(options.forward_sync_buffers),
    }
    for name in ("find_unused_parameters", "gradient_as_bucket_view", "static_graph"):
        data[name] = int(options.unused[name])
    if group is not None:
        data["backend_name"] = group.name()
    return data
