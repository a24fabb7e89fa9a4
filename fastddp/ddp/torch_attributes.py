"""What tools read from torch's class by names of its own: attributes, the reducer, the logger."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.nn.parallel import distributed as torch_module

from fastddp.ddp.arrivals import Arrivals
from fastddp.engine.plan import MiB

if TYPE_CHECKING:
    from fastddp.ddp.options import Options
    from fastddp.ddp.replica import Replica


class TorchReducer:
    """What is called on torch's reducer. Where a method does nothing, there is nothing to do.

    Args:
        replica: what synchronises the model.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def prepare_for_forward(self) -> None: ...

    def prepare_for_backward(self, outputs: Sequence[torch.Tensor]) -> None:
        """Nothing to prepare: whether to average is decided when backward begins."""

    def _get_local_used_map(self) -> torch.Tensor:
        """Returns, by parameter, how many ranks had a gradient for it in the latest backward."""
        replica = self._replica
        used = dict(zip(replica.hooked, replica.used_by(), strict=True))
        counts = [used[p] for p in replica.module.parameters() if p in used and p.requires_grad]
        return torch.tensor(counts, dtype=torch.int32, device=replica.device)

    def get_backward_stats(self) -> list[int]:
        """Returns, by parameter, how many nanoseconds into the latest backward its gradient came.

        Measured from the first call on, which returns zeros.
        """
        replica = self._replica
        hooked = [p for p in replica.module.parameters() if p in replica.hooked and p.requires_grad]
        if replica.arrivals is None or not replica.arrivals.are_of(hooked):
            replica.arrivals = Arrivals(hooked)
        return replica.arrivals.since(replica.stats().began_ns)

    def _ddp_graph_static(self) -> bool:
        """Returns whether this rank has used the same parameters in every backward."""
        return self._replica.stats().is_static

    def _rebuild_buckets(self) -> bool:
        """Returns whether buckets were planned anew by this call, which is never."""
        return False

    def _push_all_rebuilt_params(self) -> None:
        """Nothing to push: buckets are planned from what has arrived."""

    def _delay_all_reduce(self) -> None: ...

    def _set_static_graph(self) -> None:
        """Nothing to set but what is read back, see :mod:`fastddp.ddp.options`."""
        self._replica.options.unused["static_graph"] = True

    def _set_sparse_metadata(self, global_unique_ids: Mapping[str, torch.Tensor]) -> None:
        """Nothing to set: which rows the ranks' gradients have is found out in each round."""

    def set_logger(self, logger: object) -> None:
        """Nothing to set: what is logged is asked for, not told."""

    def _check_reducer_finalized(self) -> None:
        """Nothing to check: a backward that raised leaves no round open."""

    def _install_post_backward_futures(self, futures: Sequence[torch.futures.Future[Any]]) -> None:
        """Has the futures waited for at the end of the next synchronised backward."""
        self._replica.wait_after_backward(futures)

    def _remove_autograd_hooks(self) -> None:
        """Leaves gradients this rank's own from now on."""
        self._replica.detach()

    def _update_process_group(self, new_process_group: ProcessGroup) -> None:
        """Averages over the ranks of another group from now on."""
        self._replica.move_to(new_process_group)


class TorchLogger:
    """What is called on torch's logger, for the wrapper's own entries of the logging data.

    Args:
        wrapper: whose.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def set_error_and_log(self, error: str) -> None:
        """Has the logging data say that there was an error, and the latest one's text."""
        self._wrapper._logged |= {"has_error": 1, "error": error}

    def _set_comm_hook_name(self, comm_hook: str) -> None:
        self._wrapper._logged["comm_hook"] = comm_hook

    def _set_uneven_input_join(self) -> None:
        self._wrapper._logged["join_uneven_inputs"] = 1

    def _set_static_graph(self) -> None:
        self._wrapper._set_static_graph()

    def set_runtime_stats_and_log(self) -> None:
        """Nothing to set: that is done before each forward."""

    def _get_ddp_logging_data(self) -> LoggingData:
        return LoggingData(self._wrapper._get_ddp_logging_data())


class LoggingData:
    """The logging data as torch's logger has it.

    Args:
        entries: as torch's class has it.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.strs_map = {name: value for name, value in entries.items() if isinstance(value, str)}
        self.ints_map = {
            name: value for name, value in entries.items() if name not in self.strs_map
        }


class TorchAttributes:
    """What torch's class keeps in attributes, by their names; AttributeError where it has none.

    Args:
        wrapper: whose.
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
        return uses_side_stream()

    # ---- buffers ---------------------------------------------------------------------------------

    @property
    def named_module_buffers(self) -> Mapping[str, torch.Tensor]:
        return self._replica.buffers.named()

    @property
    def modules_buffers(self) -> list[torch.Tensor]:
        return list(self.named_module_buffers.values())

    @property
    def buffer_hook(self) -> Any:
        hook = self._replica.buffer_hook
        if hook is None:
            raise AttributeError("none has been registered")
        location = torch_module._BufferCommHookLocation
        where = location.PRE_FORWARD if hook.before_forward else location.POST_FORWARD
        return torch_module._BufferCommHook(hook.hook, hook.state, where)

    # ---- parameters ------------------------------------------------------------------------------

    @property
    def parameters_to_ignore(self) -> set[str]:
        return {*self._replica.ignored, *self._replica.delayed}

    @property
    def _module_parameters(self) -> list[torch.nn.Parameter]:
        elsewhere = self.parameters_to_ignore
        return [p for name, p in self._replica.module.named_parameters() if name not in elsewhere]

    @property
    def _delay_all_reduce_params(self) -> list[torch.nn.Parameter]:
        delayed = self._replica.delayed
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

    Raises:
        AttributeError: if it has none of that name.
    """
    given = wrapper._replica.options.unused
    if name in given:
        return given[name]
    if not hasattr(TorchAttributes, name):
        raise AttributeError(name)
    return getattr(TorchAttributes(wrapper), name)


def uses_side_stream() -> bool:
    """Returns whether inputs go to their GPU on a stream of their own, as torch's variable says."""
    return os.environ.get("PYTORCH_DDP_USE_SIDE_STREAM", "1") == "1"


def warn_of_deprecated(
    broadcast_buffers: bool | None, forward_sync_buffers: bool | None, check_reduction: bool
) -> None:
    """Warns of arguments that the installed torch's class warns of, where the caller stands."""
    if check_reduction:
        _warn("check_reduction is deprecated in torch's class and changes nothing; leave it out")
    if broadcast_buffers is None or not _torch_has_forward_sync_buffers():
        return
    if forward_sync_buffers is not None:
        _warn(
            "broadcast_buffers is deprecated in torch's class, and ignored where"
            " forward_sync_buffers is given too; leave it out"
        )
    else:
        _warn(
            "broadcast_buffers is deprecated in torch's class; use forward_sync_buffers instead,"
            " with which buffers are still made equal at the start"
        )


def _torch_has_forward_sync_buffers() -> bool:
    return "forward_sync_buffers" in inspect.signature(TorchDDP.__init__).parameters


def _warn(text: str) -> None:
    """Gives a FutureWarning whose place is the first caller outside of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastddp."):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fastddp: {text}", FutureWarning, stacklevel=level)
