"""What tools read from torch's class in attributes, by names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parallel import distributed as torch_module

from fastddp.ddp.options import Options
from fastddp.ddp.replica import Replica
from fastddp.ddp.torch_logger import TorchLogger
from fastddp.ddp.torch_reducer import TorchReducer
from fastddp.engine.plan import MiB


class TorchAttributes:
    """What torch's class keeps in attributes, by their names; AttributeError where it has none.

    Args:
        wrapper: the wrapper that is asked for them.
    """

    is_multi_device_module = False
    broadcast_bucket_size = 250 * 1024 * 1024  # for those who broadcast a module's state themselves
    _use_python_reducer = False
    _ddp_sink_clone = True
    _delay_grad_buffer = None  # delayed gradients are packed when they are sent

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._replica: Replica = wrapper._replica
        self._options: Options = self._replica.options

    @property
    def device(self) -> torch.device:
        return self._replica.device

    @property
    def device_type(self) -> str:
        return self._replica.device.type

    @property
    def device_ids(self) -> list[int] | None:
        return [device.index for device in self._options.device_ids] or None

    @property
    def output_device(self) -> torch.device | None:
        return self._options.output_device

    @property
    def mixed_precision(self) -> object:
        return self._options.mixed_precision

    @property
    def use_side_stream_for_tensor_copies(self) -> bool:
        return self._options.side_stream

    # ---- buffers ---------------------------------------------------------------------------------

    @property
    def named_module_buffers(self) -> Mapping[str, torch.Tensor]:
        return self._replica.model.buffers()

    @property
    def modules_buffers(self) -> list[torch.Tensor]:
        return list(self.named_module_buffers.values())

    @property
    def buffer_hook(self) -> Any:
        hook = self._replica.buffers.hook
        if hook is None:
            raise AttributeError("none has been registered")
        location = torch_module._BufferCommHookLocation
        where = location.PRE_FORWARD if hook.before_forward else location.POST_FORWARD
        return torch_module._BufferCommHook(hook.hook, hook.state, where)

    # ---- parameters ------------------------------------------------------------------------------

    @property
    def parameters_to_ignore(self) -> set[str]:
        return {*self._replica.model.ignored, *self._replica.model.delayed}

    @property
    def _module_parameters(self) -> list[torch.nn.Parameter]:
        elsewhere = self.parameters_to_ignore
        return [p for name, p in self._replica.module.named_parameters() if name not in elsewhere]

    @property
    def _delay_all_reduce_params(self) -> list[torch.nn.Parameter]:
        delayed = self._replica.model.delayed
        return [p for name, p in self._replica.module.named_parameters() if name in delayed]

    @property
    def _delay_all_reduce_all_params(self) -> bool:
        return not any(param.requires_grad for param in self._module_parameters)

    @property
    def _delay_grad_views(self) -> list[torch.Tensor]:
        return []

    # ---- buckets ---------------------------------------------------------------------------------

    @property
    def bucket_bytes_cap(self) -> int:
        # Not less than the first bucket that torch.compile assumes, or it refuses.
        return max(self._options.caps_bytes[-1], MiB)

    @property
    def bucket_bytes_cap_default(self) -> bool:
        has_list = bool(self._options.unused["bucket_bytes_cap_list"])
        return len(self._options.caps_bytes) > 1 and not has_list

    @property
    def _bucket_config(self) -> Any:
        caps = self._options.caps_bytes
        return torch_module._BucketCapacityConfig(  # not in every torch: AttributeError
            bucket_bytes_cap=max(caps),
            per_bucket_bytes_caps=tuple(self._options.unused["bucket_bytes_cap_list"]),
            first_bucket_bytes_cap=caps[0] if self.bucket_bytes_cap_default else max(caps),
        )

    @property
    def lazy_bucket_allocation(self) -> bool:
        return self._options.lazy_buckets

    @property
    def _has_rebuilt_buckets(self) -> bool:
        return self._replica.stats().rounds > 0

    # ---- the rest --------------------------------------------------------------------------------

    @property
    def reducer(self) -> TorchReducer:
        return TorchReducer(self._replica)

    @property
    def logger(self) -> TorchLogger:
        return TorchLogger(self._wrapper)

    @property
    def _lazy_init_ran(self) -> bool:
        return self._replica.has_begun

    @property
    def _accum_grad_hooks(self) -> list[object]:
        return []  # of a reducer in Python that torch has for its compiler

    @property
    def _authoritative_rank(self) -> int:
        rank = self._replica.authoritative_rank
        if rank is None:
            raise AttributeError("no join has ended")
        return rank


def attribute(wrapper: Any, name: str) -> Any:
    """Returns what torch's class keeps in an attribute.

    Args:
        wrapper: the wrapper that is asked for it.
        name: the name of the attribute.

    Raises:
        AttributeError: if it has none of that name.
    """
    given = wrapper._replica.options.unused
    if name in given:
        return given[name]
    if not hasattr(TorchAttributes, name):
        raise AttributeError(name)
    return getattr(TorchAttributes(wrapper), name)
