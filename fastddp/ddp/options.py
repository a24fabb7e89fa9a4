"""What torch's constructor takes, checked and reduced to what there is still to decide.

Several of torch's arguments choose between a slow and a fast path, or tell it something about the
graph. Here the fast path is the only one and nothing needs to be told, so they are accepted and
change nothing: ``find_unused_parameters``, ``static_graph``, ``gradient_as_bucket_view``,
``batched_grad_copy``, ``skip_all_reduce_unused_params``, ``check_reduction``, and ``dim``, which
only mattered to several devices per process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel.distributed import _MixedPrecision

from fastddp import config
from fastddp.engine.delay import Delay
from fastddp.engine.plan import MiB

_DEFAULT_CAPS_MB = (1.0, 25.0)
"""A small first bucket, so that communication starts early in backward."""

_NO_LIMIT = 2**63 - 1
"""The cap, in bytes, of a bucket that is never full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The choices for one wrapped module; the same on every rank, but for devices."""

    caps_bytes: tuple[int, ...]
    """Bytes of the buckets, one by one; the last number serves all further ones."""
    device_ids: tuple[torch.device, ...]
    """At most one device, to which the inputs of ``forward`` are moved."""
    output_device: torch.device | None
    init_sync: bool
    init_sync_buffers: bool
    forward_sync_buffers: bool
    mixed_precision: _MixedPrecision | None
    comm_dtype: torch.dtype | None
    """The dtype that gradients are cast to for the all-reduce; None to send them as they are."""
    delay: Delay | None
    lazy_buckets: bool
    """Whether buckets are allocated as gradients arrive, and released after backward."""
    engine: str | None
    unused: dict[str, Any]
    """Torch's arguments that change nothing, kept for tools that read them back."""
    side_stream: bool
    """Whether inputs are moved on a stream of their own; read from the environment at wrapping."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        bucket_cap_mb: float | None,
        bucket_cap_mb_list: Sequence[float] | None,
        device_ids: Sequence[int | torch.device] | None,
        output_device: int | torch.device | None,
        broadcast_buffers: bool | None,
        forward_sync_buffers: bool | None,
        init_sync: bool,
        mixed_precision: _MixedPrecision | None,
        comm_dtype: torch.dtype | None,
        delay_all_reduce_named_params: Sequence[tuple[str, nn.Parameter]] | None,
        param_to_hook_all_reduce: nn.Parameter | None,
        lazy_bucket_allocation: bool,
        engine: str | None,
        unused: Mapping[str, Any],
    ) -> Options:
        """Returns the options that torch's arguments amount to.

        The keywords are those of :class:`fastddp.DistributedDataParallel`; ``unused`` has the
        arguments that change nothing, by name.

        Raises:
            ValueError: if a cap, a device, a dtype or a delayed parameter is unfit.
        """
        caps = _caps(bucket_cap_mb, bucket_cap_mb_list)
        ids, output = _devices(module, device_ids, output_device)
        _check_mixed_precision(mixed_precision)
        _check_comm_dtype(comm_dtype, mixed_precision)
        # broadcast_buffers=False stops both, forward_sync_buffers=False only the one of forward.
        both = broadcast_buffers is not False
        return cls(
            caps_bytes=caps,
            device_ids=ids,
            output_device=output,
            init_sync=init_sync,
            init_sync_buffers=both or forward_sync_buffers is not None,
            forward_sync_buffers=both if forward_sync_buffers is None else forward_sync_buffers,
            mixed_precision=mixed_precision,
            comm_dtype=comm_dtype,
            delay=Delay.of(module, delay_all_reduce_named_params, param_to_hook_all_reduce),
            lazy_buckets=bool(lazy_bucket_allocation),
            engine=engine,
            unused={
                **unused,
                "bucket_bytes_cap_list": list(caps) if bucket_cap_mb_list is not None else [],
            },
            side_stream=config.side_stream(),
        )

    def to_agree_on(self) -> dict[str, str]:
        """Returns in words what must be the same on all ranks, by name."""
        return {
            "bucket caps": ", ".join(
                "no limit" if cap == _NO_LIMIT else f"{cap / MiB:g} MiB" for cap in self.caps_bytes
            ),
            "broadcast_buffers": f"{self.init_sync_buffers} at the start,"
            f" {self.forward_sync_buffers} before forward",
            "mixed precision": str(self.mixed_precision),
            "comm_dtype": str(self.comm_dtype),
            "the delay of all-reduces": str(self.delay),
        }

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """The dtype in which gradients are averaged; None for that of the parameters."""
        mixed = self.mixed_precision
        return None if mixed is None else mixed.reduce_dtype or mixed.param_dtype


def _check_mixed_precision(mixed: object) -> None:
    if mixed is None:
        return
    if not isinstance(mixed, _MixedPrecision):
        raise ValueError(
            "fastddp: mixed_precision must be a torch.nn.parallel.distributed._MixedPrecision, got"
            f" {type(mixed).__module__}.{type(mixed).__qualname__}"
        )
    for name in ("param_dtype", "reduce_dtype", "buffer_dtype"):
        dtype = getattr(mixed, name)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"fastddp: mixed_precision.{name} must be a floating-point dtype, got {dtype!r}"
            )


def _check_comm_dtype(dtype: object, mixed: _MixedPrecision | None) -> None:
    if dtype is None:
        return
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            "fastddp: comm_dtype must be torch.bfloat16, torch.float16 or torch.float32, got"
            f" {dtype!r}"
        )
    if mixed is not None and (mixed.reduce_dtype or mixed.param_dtype) is not None:
        raise ValueError(
            f"fastddp: comm_dtype={dtype} and a mixed_precision that reduces in"
            f" {mixed.reduce_dtype or mixed.param_dtype} both say how gradients travel; leave one"
            " out"
        )


def _caps(cap_mb: float | None, caps_mb: Sequence[float] | None) -> tuple[int, ...]:
    if cap_mb is not None and caps_mb is not None:
        raise ValueError("fastddp: give bucket_cap_mb or bucket_cap_mb_list, not both")
    given: Any = caps_mb if cap_mb is None else (cap_mb,)
    if given is None:
        given = _DEFAULT_CAPS_MB
    if not isinstance(given, Sequence) or not given or not all(map(_is_cap, given)):
        raise ValueError(
            "fastddp: bucket_cap_mb, or each entry of bucket_cap_mb_list, is a number of MiB above"
            f" 0, or inf for one bucket; got {given!r}"
        )
    return tuple(max(1, int(min(cap * MiB, _NO_LIMIT))) for cap in given)


def _is_cap(cap: object) -> bool:
    is_number = isinstance(cap, Real) and not isinstance(cap, bool)
    return is_number and bool(cast(Any, cap) > 0)


def _devices(
    module: nn.Module,
    device_ids: Sequence[int | torch.device] | None,
    output_device: int | torch.device | None,
) -> tuple[tuple[torch.device, ...], torch.device | None]:
    if not device_ids and output_device is None:
        return (), None
    where = sorted({str(param.device) for param in module.parameters()})
    if where == ["cpu"] or not device_ids:
        raise ValueError(
            "fastddp: device_ids and output_device are for a model on one GPU, but got"
            f" device_ids={device_ids}, output_device={output_device} and parameters on"
            f" {', '.join(where)}; leave both out"
        )
    if len(device_ids) > 1:
        raise ValueError(
            f"fastddp: device_ids={list(device_ids)} has {len(device_ids)} entries; one process"
            " drives one device, so device_ids can only be None or contain a single element."
        )
    kind = where[0].partition(":")[0]
    device = _device(kind, device_ids[0])
    return (device,), device if output_device is None else _device(kind, output_device)


def _device(kind: str, device: int | torch.device) -> torch.device:
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device)
