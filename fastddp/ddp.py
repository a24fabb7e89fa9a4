"""`DistributedDataParallel`: torch's class, with a reducer of our own behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.distributed.utils import _to_kwargs
from torch.nn.parallel.distributed import _BufferCommHookLocation

from fastddp import engine as engines
from fastddp import hooks, join, torch_face
from fastddp.agreement import report_failure
from fastddp.buffers import BufferHook
from fastddp.compiler import untraced_itself
from fastddp.distributed_autograd import refuse_distributed_autograd
from fastddp.logging_data import logging_data
from fastddp.options import Options
from fastddp.plan import BucketPlan, MiB
from fastddp.replica import Replica
from fastddp.streams import on_device


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """Averages a module's gradients over the ranks of a process group.

    Takes torch's arguments and behaves as torch's class, with three differences: the arguments
    that describe the graph are not needed (see :mod:`fastddp.options`), whether to synchronise is
    decided when *backward* begins rather than at the forward before it, and ``.grad`` is always a
    view of the bucket that was reduced.

    On the CPU, with two ranks or more, large tensors of the whole process get memory that stays
    mapped when they are freed; ``FASTDDP_KEEP_MEMORY=0`` prevents it, see :mod:`fastddp.memory`.

    It is a subclass of torch's, so that ``isinstance`` holds everywhere, but none of torch's
    ``__init__`` runs.

    Args:
        module: the model; its parameters on one device.
        device_ids: at most one GPU, to which the inputs of ``forward`` are moved.
        process_group: where to average, by default the default group.
        device_mesh: a one-dimensional mesh, instead of ``process_group``.
        init_sync: whether to compare the ranks' models and give all of them rank 0's values.
        broadcast_buffers: False leaves buffers alone at the start and before every forward.
        forward_sync_buffers: False leaves them alone before every forward only.
        bucket_cap_mb: MiB per bucket, 25 by default after a first one of 1.
        bucket_cap_mb_list: MiB per bucket, one by one; the last serves all further ones.
        mixed_precision: see :mod:`fastddp.mixed_precision`.
        comm_dtype: what gradients are cast to on their way between ranks, such as
            ``torch.bfloat16``; divided by the number of ranks first, in float32. ``.grad`` keeps
            the parameter's dtype. float64 gradients, delayed ones, sparse ones and those of a
            communication hook travel as they are. By default all do.
        delay_all_reduce_named_params: see :mod:`fastddp.delayed`.
        param_to_hook_all_reduce: see there.
        engine: ``"native"`` or ``"python"``; by default see :func:`fastddp.engine.choose`.

    Raises:
        fastddp.MismatchError: on every rank, if the ranks' modules differ in a parameter's or
            buffer's name, shape, dtype, strides or ``requires_grad``, or if one rank's cannot be
            wrapped.
        ValueError: if the module or an argument is unfit.
        RuntimeError: if there is no process group, or no parameter requires a gradient.

    Example::

        dist.init_process_group("gloo")
        model = fastddp.DistributedDataParallel(model)
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        delay_all_reduce_named_params: Sequence[tuple[str, nn.Parameter]] | None = None,
        param_to_hook_all_reduce: nn.Parameter | None = None,
        mixed_precision: Any = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: Sequence[float] | None = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        *,
        comm_dtype: torch.dtype | None = None,
        engine: str | None = None,
    ) -> None:
        group = self._find_group(process_group, device_mesh)
        try:
            options = Options.of(
                module,
                bucket_cap_mb=bucket_cap_mb,
                bucket_cap_mb_list=bucket_cap_mb_list,
                device_ids=device_ids,
                output_device=output_device,
                broadcast_buffers=broadcast_buffers,
                forward_sync_buffers=forward_sync_buffers,
                init_sync=init_sync,
                mixed_precision=mixed_precision,
                comm_dtype=comm_dtype,
                delay_all_reduce_named_params=delay_all_reduce_named_params,
                param_to_hook_all_reduce=param_to_hook_all_reduce,
                engine=engine,
                unused={
                    "dim": dim,
                    "find_unused_parameters": find_unused_parameters,
                    "check_reduction": check_reduction,
                    "gradient_as_bucket_view": gradient_as_bucket_view,
                    "static_graph": static_graph,
                    "skip_all_reduce_unused_params": skip_all_reduce_unused_params,
                    "batched_grad_copy": batched_grad_copy,
                    "bucket_bytes_cap_list": [int(cap * MiB) for cap in bucket_cap_mb_list or ()],
                    "device_mesh": device_mesh,
                },
            )
        except ValueError as error:
            if init_sync:  # ranks with better arguments would wait for this one
                with on_device(_device_of(module)):
                    report_failure(group, error)
            raise
        replica = Replica(module, group, options)
        with on_device(_device_of(module)):
            replica.start()
        self._assemble(module, replica)

    def _assemble(self, module: nn.Module, replica: Replica) -> None:
        nn.Module.__init__(self)
        Joinable.__init__(self)
        self.module = module
        self._replica = replica
        self._init_state()
        replica.attach()

    def _init_state(self) -> None:
        self._divide_by_initial_world_size = True
        self._comm_hooks: list[tuple[Callable[..., Any], object]] = []
        self._comm_hook_name: str | None = None

    @staticmethod
    def _find_group(group: ProcessGroup | None, device_mesh: Any = None) -> ProcessGroup | None:
        if group is not None and device_mesh is not None:
            raise RuntimeError("Cannot specify both process_group and device_mesh arguments.")
        if device_mesh is not None:
            if device_mesh.ndim != 1:
                raise RuntimeError(f"Only 1D device mesh is supported, but got {device_mesh}.")
            group = device_mesh.get_group(mesh_dim=0)
        if group is not None:
            if not isinstance(group, ProcessGroup):
                raise ValueError(
                    f"fastddp: process_group={group!r} is not a process group that this rank is a"
                    " member of; wrap the model on the group's ranks only"
                )
            return group
        if not dist.is_initialized():
            raise ValueError(
                "Default process group has not been initialized, please make sure to call"
                " init_process_group (or use fastddp.wrap, which does)."
            )
        return dist.group.WORLD

    # ---- training --------------------------------------------------------------------------------

    @untraced_itself
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the module, on buffers that are rank 0's where it has any."""
        refuse_distributed_autograd()
        replica = self._replica
        if self._join_config.enable:
            join.before_forward(self, replica, self._divide_by_initial_world_size)
        else:
            replica.before_forward()
        if replica.options.device_ids:
            moved, moved_kwargs = _to_kwargs(inputs, kwargs, replica.options.device_ids[0], True)
            inputs, kwargs = moved[0], moved_kwargs[0]
        if replica.low_precision is None:
            output = self._run_ddp_forward(*inputs, **kwargs)
        else:
            output = replica.low_precision.run(self._run_ddp_forward, inputs, kwargs)
        replica.after_forward(output)
        return output

    @untraced_itself
    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the module as torch.compile's active one, whose graph it cuts at the buckets.

        Uncut, a compiled backward gives all gradients at its end, and no bucket could leave early.
        """
        if self._replica.alone:
            return self.module(*inputs, **kwargs)
        torch_ddp = nn.parallel.DistributedDataParallel
        before = torch_ddp._active_ddp_module
        torch_ddp._active_ddp_module = self
        try:
            return self.module(*inputs, **kwargs)
        finally:
            torch_ddp._active_ddp_module = before

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Lets the backwards that begin inside accumulate gradients on this rank alone.

        They are averaged by the first backward that begins outside.

        Example::

            with model.no_sync():
                for batch in batches[:-1]:
                    loss(model, batch).backward()
            loss(model, batches[-1]).backward()
        """
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    @property
    def require_backward_grad_sync(self) -> bool:
        """Whether a backward that begins now averages gradients."""
        return self._replica.sync

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, value: bool) -> None:
        self._replica.sync = value

    @property
    def process_group(self) -> ProcessGroup | None:  # type: ignore[override]  # torch: an attribute
        """Where gradients are averaged; None for a world of one process."""
        return self._replica.group

    def stats(self) -> engines.Stats:
        """Returns what synchronisation has cost this rank so far."""
        return self._replica.stats()

    def plan(self) -> BucketPlan:
        """Returns which gradient is reduced in which bucket; empty for a world of one."""
        return self._replica.plan()

    def _apply(self, *args: Any, **kwargs: Any) -> DistributedDataParallel:
        """Converts the model (`.to()` and the like), then follows its parameters."""
        self._convert(*args, **kwargs)
        self._replica.refresh()
        return self

    def _convert(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._apply(self, *args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the model in place, see `torch.nn.Module.compile`; synchronising it is not."""
        self.module.compile(*args, **kwargs)

    def train(self, mode: bool = True) -> DistributedDataParallel:
        nn.Module.train(self, mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            replica = self.__dict__.get("_replica")
            attributes = {} if replica is None else torch_face.attributes(replica)
            if name in attributes:
                return attributes[name]
            raise

    # ---- customs ---------------------------------------------------------------------------------

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """Has a hook communicate the gradients, in place of the all-reduce.

        The hook is called as ``hook(state, bucket)`` with each bucket, on every rank in the same
        order, and returns a ``torch.futures.Future`` of the reduced gradients. A bucket has the
        methods of ``torch.distributed.GradBucket``. Its gradients come undivided: averaging is the
        hook's business. All of torch's hooks will do.

        Args:
            state: passed on to the hook.
            hook: may communicate in any number of steps.

        Raises:
            TypeError: if the hook cannot be called.
            ValueError: if the hook's annotations are of other types.
            RuntimeError: if there is a hook already.
        """
        hooks.check(hook)
        self._set_hook(lambda bucket: hook(state, bucket))
        self._comm_hooks = [*self._comm_hooks, (hook, state)]
        self._comm_hook_name = getattr(hook, "__qualname__", type(hook).__qualname__)

    def _register_builtin_comm_hook(self, comm_hook_type: Any) -> None:
        """Has gradients averaged, or compressed to 16 bits and averaged, as torch's enum says."""
        self._set_hook(hooks.builtin(comm_hook_type, lambda: self._replica.live_group))
        self._comm_hook_name = str(comm_hook_type)

    def _set_hook(self, hook: hooks.CommHook) -> None:
        if self._replica.hook is not None:
            raise RuntimeError(
                "register_comm_hook or register_builtin_comm_hook can only be called once."
            )
        self._replica.set_hook(hook)

    def _register_buffer_comm_hook(
        self,
        state: Any,
        hook: Callable[..., Any],
        comm_hook_location: Any = _BufferCommHookLocation.POST_FORWARD,
    ) -> None:
        """Has a hook synchronise the buffers, in place of rank 0's broadcast before forward.

        Args:
            state: passed on to the hook.
            hook: called as ``hook(state, buffers)`` with the buffers by name; may return a list of
                futures, which are waited for at the end of backward.
            comm_hook_location: before or after forward, in torch's enum.
        """
        if not callable(hook):
            raise TypeError(f"fastddp: a buffer hook must be callable, got {type(hook).__name__}")
        before = comm_hook_location == _BufferCommHookLocation.PRE_FORWARD
        self._replica.buffer_hook = BufferHook(hook, state, before)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Returns what stands in for this rank once it has run out of inputs.

        Args:
            **kwargs: ``divide_by_initial_world_size``, True by default: divide gradients by the
                number of all ranks, not of those that still have inputs.
        """
        self._divide_by_initial_world_size = kwargs.get("divide_by_initial_world_size", True)
        return join.ReplicaJoinHook(self._replica)

    def _update_process_group(self, new_process_group: ProcessGroup) -> None:
        """Averages over the ranks of another group from now on; does nothing on other ranks."""
        if isinstance(new_process_group, ProcessGroup):
            self._replica.move_to(new_process_group)

    # ---- copies ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the group and the reducer, which cannot leave the process.

        Raises:
            RuntimeError: if the group is not the default one, which is the one a copy will use.
        """
        if self._replica.group is not dist.group.WORLD:
            raise RuntimeError(
                "DDP Pickling/Unpickling are only supported when using DDP with the default"
                " process group. That is, when you have called init_process_group and have not"
                " passed process_group argument to DDP constructor"
            )
        state = self.__dict__.copy()
        state["_replica"] = self._replica.options
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restore(self._find_group(None))

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedDataParallel:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self.__dict__ | {"_replica": self._replica.options}
        new.__dict__.update(copy.deepcopy(state, memo))
        new._restore(self._replica.group)
        return new

    def _restore(self, group: ProcessGroup | None) -> None:
        """Gives a copy, which holds the options in its place, a replica of its own."""
        replica = Replica(self.module, group, self.__dict__["_replica"])
        self.__dict__["_replica"] = replica
        replica.attach()

    # ---- what torch's class has and there is nothing to do for -----------------------------------

    def _set_static_graph(self) -> None:
        """Nothing to set: see :mod:`fastddp.options`."""

    def _set_ddp_runtime_logging_sample_rate(self, _: int) -> None:
        """Nothing to set: every step is measured, see :meth:`stats`."""

    def _check_reducer_finalized(self) -> None:
        """Nothing to check: a backward that raised leaves no round open."""

    def _get_ddp_logging_data(self) -> dict[str, Any]:
        replica = self._replica
        data = logging_data(
            self.module, replica.group, replica.options, self.plan(), self.stats().rounds
        )
        if self._comm_hook_name is not None:
            data["comm_hook"] = self._comm_hook_name
        return data

    def _remove_autograd_hooks(self) -> None:
        self._replica.detach()


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"fastddp does not support {what} of torch's DistributedDataParallel yet; see"
        " docs/compatibility.md for what it does"
    )


def _refused(name: str) -> Callable[..., NoReturn]:
    def method(self: DistributedDataParallel, *_: Any, **__: Any) -> NoReturn:  # noqa: ARG001
        _refuse(f"{name}()")

    method.__name__ = name
    return method


# Inherited, these would run torch's code on attributes that are not there.
for _name in (
    "_set_sparse_metadata",
    *("_pre_forward", "_post_forward"),  # halves of forward, which torch's replicate() calls
):
    setattr(DistributedDataParallel, _name, _refused(_name))


def _device_of(module: nn.Module) -> torch.device:
    return next((param.device for param in module.parameters()), torch.device("cpu"))
