"""The entries of torch's logging data, under torch's names."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from fastddp.ddp.options import Options
from fastddp.engine.plan import Bucket, BucketPlan
from fastddp.engine.stats import Stats

_ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "TORCH_DISTRIBUTED_DEBUG")
_ENVIRONMENT_OF = {
    "gloo": ("GLOO_DEVICE_TRANSPORT", "GLOO_SOCKET_IFNAME"),
    "nccl": (
        *("NCCL_SOCKET_IFNAME", "NCCL_BLOCKING_WAIT", "NCCL_ASYNC_ERROR_HANDLING"),
        *("NCCL_DEBUG", "NCCL_NTHREADS", "NCCL_IB_TIMEOUT"),
    ),
}
_DTYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.complex64: "c10::complex<float>",
    torch.complex128: "c10::complex<double>",
}
"""Torch's logging data has C++'s names."""


class Samples:
    """Times of some iterations: of the first ten, then of every so many.

    In nanoseconds, on the host; taken at the forward that follows the iteration. An iteration is a
    forward that may be followed by a synchronised backward.
    """

    def __init__(self) -> None:
        self.rate = 100
        """After the first ten iterations, the distance between two that are measured."""
        self._times: dict[str, Any] = {}
        self._latest = 0
        self._iteration = 0
        self._forward_ns = 0
        self._rounds = 0
        self._totals: Counter[str] = Counter()
        self._num_taken = 0

    def at_forward(self, stats: Callable[[], Stats]) -> None:
        """Takes the times of the iteration before; called at the beginning of each one.

        Args:
            stats: returns the figures of the synchronised backwards so far.
        """
        nth = self._iteration
        self._iteration += 1
        if nth > 0 and (nth <= 10 or nth % self.rate == 0):
            self._latest = nth
            self._take(stats())
        self._forward_ns = time.time_ns()

    def entries(self, *, on_host: bool) -> dict[str, Any]:
        """Returns the times by torch's names.

        Args:
            on_host: whether the model computes on the host. A device's times are not measured, and
                left out.
        """
        return {"iteration": self._latest} | (self._times if on_host else {})

    def _take(self, stats: Stats) -> None:
        if stats.rounds == self._rounds:
            return  # no backward has followed
        self._rounds = stats.rounds
        begin, backward, comm, wait = (
            stats.began_ns,
            int(stats.backward_us_last * 1000),
            int(stats.comm_us_last * 1000),
            int(stats.wait_us_last * 1000),
        )
        times = {
            "forward_compute_time": begin - self._forward_ns,
            "backward_compute_time": backward,
            "backward_comm_time": comm,
            "backward_compute_comm_overlap_time": max(0, comm - wait),
        }
        self._num_taken += 1
        self._totals.update(times)
        end = begin + backward + wait
        self._times = times | {
            **{f"avg_{name}": self._totals[name] // self._num_taken for name in times},
            "forward_compute_time_start": self._forward_ns,
            "backward_compute_time_start": begin,
            "backward_compute_time_end": begin + backward,
            "backward_comm_time_start": end - comm,
            "backward_comm_time_end": end,
        }


def logging_data(
    module: nn.Module,
    group: ProcessGroup | None,
    options: Options,
    plan: BucketPlan,
    stats: Stats,
    error: str,
) -> dict[str, Any]:
    """Returns the entries as torch does: sizes in bytes, truth values as numbers, lists as text.

    ``can_set_static_graph`` is not there: Lightning would advise to set what changes nothing.

    Args:
        module: the module that was wrapped.
        group: the ranks that have a copy of it; None for a world of one process.
        options: the arguments with which it was wrapped.
        plan: the plan of the buckets at present.
        stats: the figures of the synchronised backwards so far.
        error: the text of the latest error in one of them; empty if there was none.
    """
    data = _model(module) | _options(options) | _group(group) | _from_environment(_ENVIRONMENT)
    data["bucket_sizes"] = _sizes(plan.buckets)
    if stats.rounds > 0:
        data |= _rounds(plan, stats)
    if error:
        data |= {"has_error": 1, "error": error}
    return data


def _model(module: nn.Module) -> dict[str, Any]:
    params = [param for param in module.parameters() if param.requires_grad]
    dtypes = {_DTYPES.get(param.dtype, str(param.dtype)) for param in params}
    return {
        "module_name": type(module).__name__,
        "num_parameter_tensors": len(params),
        "total_parameter_size_bytes": sum(param.nbytes for param in params),
        "dtypes": ", ".join(sorted(dtypes)),
        "has_sync_bn": int(any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())),
        "is_multi_device_module": 0,
    }


def _options(options: Options) -> dict[str, Any]:
    output = options.output_device
    flags = ("find_unused_parameters", "gradient_as_bucket_view", "static_graph")
    return {
        "bucket_cap_bytes": options.caps_bytes[-1],
        "device_ids": ", ".join(str(device.index) for device in options.device_ids),
        "output_device": -1 if output is None or output.index is None else output.index,
        "broadcast_buffers": int(options.forward_sync_buffers),
        **{name: int(options.unused[name]) for name in flags},
    }


def _group(group: ProcessGroup | None) -> dict[str, Any]:
    if group is None:
        return {"world_size": 1, "rank": 0}
    name = group.name()
    data = {"world_size": group.size(), "rank": group.rank(), "backend_name": name}
    if name == "gloo":
        threads = getattr(
            getattr(group._get_backend(torch.device("cpu")), "options", None), "_threads", None
        )
        if threads is not None:
            data["gloo_num_threads"] = threads
    return data | _from_environment(_ENVIRONMENT_OF.get(name, ()))


def _from_environment(names: Iterable[str]) -> dict[str, Any]:
    return {name.lower(): os.environ.get(name, "N/A") for name in names}


def _rounds(plan: BucketPlan, stats: Stats) -> dict[str, Any]:
    data: dict[str, Any] = {
        "num_buckets_reduced": stats.num_buckets,
        "unused_parameter_size": stats.unused_bytes_last,
    }
    # The plan of the second round is the first that follows an order of arrival.
    data["has_rebuilt_buckets"] = int(stats.rounds > 1)
    if stats.rounds > 1:
        order = [[str(slot.param) for slot in bucket.slots] for bucket in plan.buckets]
        data["rebuilt_bucket_sizes"] = _sizes(plan.buckets)
        data["rebuilt_per_bucket_param_indices"] = ", ".join(map(" ".join, order))
        # The one that the plan follows.
        data["prev_iteration_grad_ready_order_indices"] = ", ".join(chain.from_iterable(order))
    return data


def _sizes(buckets: Iterable[Bucket]) -> str:
    """Lists the buckets' sizes, which for torch are those of their gradients."""
    sizes = (sum(slot.numel for slot in bucket.slots) * bucket.dtype.itemsize for bucket in buckets)
    return ", ".join(map(str, sizes))
