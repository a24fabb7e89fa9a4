"""`DistributedDataParallel`: torch's class, with a reducer of our own behind it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.distributed.utils import _to_kwargs
from torch.nn.parallel.distributed import _BufferCommHookLocation

from fastddp.comm.groups import given_group
from fastddp.ddp import distributed_autograd, join
from fastddp.ddp.agreement import report_failure
from fastddp.ddp.buffers import BufferHook
from fastddp.ddp.deprecated import warn_of_deprecated
from fastddp.ddp.logging_data import Samples
from fastddp.ddp.options import Options
from fastddp.ddp.replica import Replica
from fastddp.ddp.torch_attributes import attribute
from fastddp.ddp.torch_methods import TorchMethods
from fastddp.device.compiler import untraced_itself
from fastddp.device.profiled import profiled
from fastddp.device.streams import on_device
from fastddp.engine import hooks
from fastddp.engine.plan import BucketPlan
from fastddp.engine.stats import Stats
from fastddp.watch.events import Kind


class DistributedDataParallel(TorchMethods, nn.parallel.DistributedDataParallel):
    """Averages a module's gradients over the ranks of a process group.

    Takes torch's arguments and behaves as torch's class, with three differences: the arguments
    that describe the graph are not needed (see :mod:`fastddp.ddp.options`), whether to synchronise
    is decided when *backward* begins rather than at the forward before it, and ``.grad`` is always
    a view of the bucket that was reduced.

    On the CPU, with two ranks or more, large tensors of the whole process get memory that stays
    mapped when they are freed; ``FASTDDP_KEEP_MEMORY=0`` prevents it, see :mod:`fastddp.memory`.

    It is a subclass of torch's, so that ``isinstance`` holds everywhere, but none of torch's
    ``__init__`` runs.

    Making one is collective, unless ``init_sync`` is False. So are a synchronised backward and, in
    grad mode, :meth:`forward`; copies, pickles, checkpoints and questions are not.

    A wrapper is to be used by one thread at a time, but for :meth:`stats` and :meth:`plan`.

    Args:
        module: the model to be trained; all of the parameters are on one device.
        device_ids: at most one GPU, to which the inputs of ``forward`` are moved.
        process_group: the ranks to average over, by default those of the default group.
        device_mesh: a one-dimensional mesh, instead of ``process_group``.
        init_sync: whether to compare the ranks' models and give all of them rank 0's values.
        broadcast_buffers: False leaves buffers alone at the start and before every forward.
        forward_sync_buffers: False leaves them alone before every forward only.
        bucket_cap_mb: MiB per bucket, 25 by default after a first one of 1; inf for one bucket.
        bucket_cap_mb_list: MiB per bucket, one by one; the last serves all further ones.
        mixed_precision: the dtypes to compute, reduce and keep buffers in, as torch's
            ``_MixedPrecision``; see :mod:`fastddp.ddp.mixed_precision`.
        lazy_bucket_allocation: whether a bucket gets its memory when its first gradient arrives,
            and only the ``.grad``s keep it after backward: with ``zero_grad(set_to_none=True)``,
            the default, no bucket is there in forward. Costs an allocation per bucket and backward.
        comm_dtype: what gradients are cast to on their way between ranks, such as
            ``torch.bfloat16``; divided by the number of ranks first, in float32. ``.grad`` keeps
            the parameter's dtype. float64 gradients, delayed ones, sparse ones and those of a
            communication hook travel as they are. By default all do.
        delay_all_reduce_named_params: pairs of name and parameter that are averaged apart from the
            others, see :mod:`fastddp.engine.delayed`.
        param_to_hook_all_reduce: the parameter that has these averaged when it gets a gradient.
        engine: the name ``"native"`` or ``"python"``; by default
            :func:`fastddp.engine.choose.choose` chooses.

    Raises:
        fastddp.MismatchError: on every rank, if the ranks' modules differ in a parameter's or
            buffer's name, shape or dtype, or a parameter's strides or ``requires_grad``, or their
            arguments in what must be the same, or if one rank's module cannot be wrapped.
        TypeError: if ``module`` is not a module.
        ValueError: if the module or an argument is unfit, or there is no process group.
        RuntimeError: if no parameter requires a gradient.
        torch.distributed.DistBackendError: if the ranks do not meet within the group's timeout;
            names those that are missing.

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
        lazy_bucket_allocation: bool = False,
        comm_dtype: torch.dtype | None = None,
        engine: str | None = None,
    ) -> None:
        warn_of_deprecated(broadcast_buffers, forward_sync_buffers, check_reduction)
        group = self._find_group(process_group, device_mesh)
        try:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"fastddp: expected a torch.nn.Module to wrap, got {type(module).__name__}"
                )
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
                lazy_bucket_allocation=lazy_bucket_allocation,
                engine=engine,
                unused={
                    "dim": dim,
                    "find_unused_parameters": find_unused_parameters,
                    "check_reduction": check_reduction,
                    "gradient_as_bucket_view": gradient_as_bucket_view,
                    "static_graph": static_graph,
                    "skip_all_reduce_unused_params": skip_all_reduce_unused_params,
                    "batched_grad_copy": batched_grad_copy,
                    "device_mesh": device_mesh,
                },
            )
            replica = Replica(module, group, options)
        except Exception as error:
            if init_sync:  # ranks with better arguments would wait for this one
                with on_device(_device_of(module)):
                    report_failure(group, error)
            raise
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
        self._manual_finalization = False
        self._comm_hooks: list[tuple[Callable[..., Any], object]] = []
        self._logged = {}
        self._samples = Samples()

    @staticmethod
    def _find_group(group: ProcessGroup | None, device_mesh: Any = None) -> ProcessGroup | None:
        return given_group(group, device_mesh)

    # ---- training --------------------------------------------------------------------------------

    @untraced_itself
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the module, on buffers that are rank 0's where it has any.

        Without grad mode (``torch.no_grad()``, ``torch.inference_mode()``) it runs on this rank's
        buffers and talks to no other rank. With it the call is collective: always for a model with
        buffers, unless ``broadcast_buffers`` or ``forward_sync_buffers`` is False or the forward
        before was inside ``no_sync``; and the first time for a copy, or one that was unpickled.
        """
        with profiled("DistributedDataParallel.forward"):
            inputs, kwargs = self._before_forward(inputs, kwargs)
            low_precision = self._replica.low_precision
            if low_precision is None:
                output = self._run_ddp_forward(*inputs, **kwargs)
            else:
                output = low_precision.run(self._run_ddp_forward, inputs, kwargs)
            return self._post_forward(output)

    @untraced_itself
    def _before_forward(self, inputs: Any, kwargs: Any) -> tuple[Any, Any]:
        """Makes buffers equal, if it is time; returns the inputs where the model is."""
        replica = self._replica
        replica.record(Kind.FORWARD_BEGIN)
        distributed_autograd.settle(replica)
        if replica.sync and torch.is_grad_enabled():
            self._samples.at_forward(replica.stats)
        if self._join_config.enable:
            join.before_forward(self, replica, self._divide_by_initial_world_size)
        else:
            replica.before_forward()
        device_ids = replica.options.device_ids
        if not device_ids:
            return inputs, kwargs
        side_stream = replica.options.side_stream
        moved, moved_kwargs = _to_kwargs(inputs, kwargs, device_ids[0], side_stream)
        return moved[0], moved_kwargs[0]

    @untraced_itself
    def _pre_forward(self, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Does what comes before the module in forward, for those who run the module themselves.

        Torch's ``replicate()`` does. Returns the inputs where the model is.

        Raises:
            NotImplementedError: with ``mixed_precision``, which has to surround the module's run.
        """
        if self._replica.low_precision is not None:
            raise NotImplementedError(
                "fastddp: mixed_precision needs the whole forward of the wrapper, not its halves"
                " (_pre_forward, _post_forward); leave it out, or use autocast"
            )
        return self._before_forward(inputs, kwargs)

    @untraced_itself
    def _post_forward(self, output: Any) -> Any:
        """Does what comes after the module in forward; returns the output as it is."""
        distributed_autograd.watch(self._replica, output)
        self._replica.after_forward(output)
        self._replica.record(Kind.FORWARD_END)
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

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Lets the backwards that begin inside accumulate gradients on this rank alone.

        They are averaged by the first backward that begins outside. Talks to no other rank, but is
        to be used on all ranks for the same backwards.

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
    def require_manual_backward_finalization(self) -> bool:
        """Whether gradients of synchronised backwards are in ``.grad`` by `finalize_backward` only.

        False by default: they are there when backward returns. A backward goes by what this is when
        it begins.

        Example::

            model.require_manual_backward_finalization = True
            for inputs, targets in loader:
                loss(model(inputs), targets).backward()
                prepare_next_batch()  # while gradients are being reduced
                model.finalize_backward()
                optimizer.step()
                optimizer.zero_grad()
        """
        return self._manual_finalization

    @require_manual_backward_finalization.setter
    def require_manual_backward_finalization(self, value: bool) -> None:
        self._manual_finalization = self._replica.manual = bool(value)

    @property
    def should_finalize_after_backward(self) -> bool:
        """Whether the next backward has to be over before `finalize_backward` may be called.

        To be asked after forward. True if the model has changed, on which all ranks have to agree,
        or has delayed gradients.
        """
        return self._replica.ends_after_backward

    def finalize_backward(self) -> None:
        """Waits for the gradients that are in flight and writes them to ``.grad``.

        To be called once for each synchronised backward that began while
        ``require_manual_backward_finalization`` was True: after it, or inside it, from a hook, when
        all of this model's gradients are there and other parts of the graph still run. What
        ``.grad`` holds in the meantime is written over. Where nothing is synchronised (a world of
        one) it does nothing. Collective only if a rank's model has changed; but it waits for what
        all ranks send in their backwards.

        Raises:
            RuntimeError: if no gradients are in flight; if it is called inside a backward whose end
                it has to wait for, see :attr:`should_finalize_after_backward`; or inside one that
                reached another model on the group before that still has gradients to send.
            fastddp.MismatchError: if the ranks' models have changed, and differ.
            torch.distributed.DistBackendError: if a collective has failed.
        """
        with profiled("DistributedDataParallel.finalize_backward"):
            self._replica.finalize()

    @property
    def require_forward_param_sync(self) -> bool:
        """Whether the next forward in grad mode gives every rank rank 0's buffers.

        Each forward in grad mode sets it anew: to whether it may be followed by an averaging.
        """
        return self._replica.buffers.sync_next

    @require_forward_param_sync.setter
    def require_forward_param_sync(self, value: bool) -> None:
        self._replica.buffers.sync_next = value

    @property
    def forward_sync_buffers(self) -> bool:
        """Whether forwards in grad mode give every rank rank 0's buffers at all."""
        return self._replica.options.forward_sync_buffers

    @forward_sync_buffers.setter
    def forward_sync_buffers(self, value: bool) -> None:
        self._replica.options = replace(self._replica.options, forward_sync_buffers=value)

    broadcast_buffers = forward_sync_buffers

    @property
    def process_group(self) -> ProcessGroup | None:  # type: ignore[override]  # torch: an attribute
        """Where gradients are averaged; None for a world of one process."""
        return self._replica.group

    def stats(self) -> Stats:
        """Returns what synchronisation has cost this rank so far.

        May be called by any thread and at any time; waits for no round.
        """
        return self._replica.stats()

    def plan(self) -> BucketPlan:
        """Returns which gradient is reduced in which bucket; empty for a world of one process.

        May be called by any thread and at any time; waits for no round.
        """
        return self._replica.plan()

    def _apply(self, *args: Any, **kwargs: Any) -> DistributedDataParallel:
        """Converts the model (`.to()` and the like), then follows its parameters.

        Raises:
            RuntimeError: if gradients are in flight.
        """
        self._replica.refuse_in_flight("a conversion of the model")
        self._convert(*args, **kwargs)
        self._replica.refresh()
        return self

    def _convert(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._apply(self, *args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the model in place, see `torch.nn.Module.compile`; synchronising it is not."""
        self.module.compile(*args, **kwargs)

    def train(self, mode: bool = True) -> DistributedDataParallel:
        """Sets the mode of the wrapper and the model, see `torch.nn.Module.train`."""
        nn.Module.train(self, mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_replica" in self.__dict__:
                with contextlib.suppress(AttributeError):
                    return attribute(self, name)
            raise

    # ---- hooks, uneven inputs, other groups ------------------------------------------------------

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """Has a hook communicate the gradients, in place of the all-reduce.

        The hook is called as ``hook(state, bucket)`` with each bucket, on every rank in the same
        order, and returns a ``torch.futures.Future`` of the reduced gradients. A bucket has the
        methods of ``torch.distributed.GradBucket``. The gradients in it are not divided by
        anything: averaging is left to the hook. All of torch's hooks will do.

        Registering talks to no other rank, but all have to do it before the same backward.

        Args:
            state: any object, which is passed on to the hook.
            hook: the function to call, which may communicate in any number of steps.

        Raises:
            TypeError: if the hook cannot be called.
            ValueError: if the hook's annotations are of other types.
            RuntimeError: if there is a hook already.
        """
        with self._errors_logged():
            hooks.check(hook)
            self._set_hook(lambda bucket: hook(state, bucket))
        self._comm_hooks = [*self._comm_hooks, (hook, state)]
        self._logged["comm_hook"] = getattr(hook, "__qualname__", type(hook).__qualname__)

    def _register_builtin_comm_hook(self, comm_hook_type: Any) -> None:
        """Has gradients averaged, or compressed to 16 bits and averaged.

        Args:
            comm_hook_type: a member of torch's ``BuiltinCommHookType``.

        Raises:
            ValueError: if it is another value.
            RuntimeError: if there is a hook already.
        """
        with self._errors_logged():
            self._set_hook(hooks.builtin(comm_hook_type, lambda: self._replica.live_group))
        self._logged["comm_hook"] = str(comm_hook_type)

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
            state: any object, which is passed on to the hook.
            hook: the function to call as ``hook(state, buffers)`` with the buffers by name, at
                forwards in grad mode; may return a list of futures, which are waited for at the end
                of backward, each for the group's timeout.
            comm_hook_location: a member of torch's enum that says before or after forward.

        Raises:
            TypeError: if the hook cannot be called.
        """
        if not callable(hook):
            raise TypeError(f"fastddp: a buffer hook must be callable, got {type(hook).__name__}")
        before = comm_hook_location == _BufferCommHookLocation.PRE_FORWARD
        self._replica.buffers.hook = BufferHook(hook, state, before)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Returns what stands in for this rank once it has run out of inputs.

        Args:
            **kwargs: ``divide_by_initial_world_size``, True by default: divide gradients by the
                number of all ranks, not of those that still have inputs.
        """
        self._divide_by_initial_world_size = kwargs.get("divide_by_initial_world_size", True)
        self._logged["join_uneven_inputs"] = 1
        return join.ReplicaJoinHook(self._replica)

    def _update_process_group(self, new_process_group: ProcessGroup) -> None:
        """Averages over the ranks of another group from now on; does nothing on other ranks.

        Collective in the new group: the ranks of it may have to meet to share memory.

        Args:
            new_process_group: the group on the ranks of it, torch's non-member value on others.

        Raises:
            RuntimeError: if gradients are in flight.
        """
        if isinstance(new_process_group, ProcessGroup):
            self._replica.move_to(new_process_group)

    def _sync_buffers(self) -> None:
        """Gives every rank rank 0's buffers now. Collective.

        For an evaluation that runs on all ranks and needs equal ones.
        """
        replica = self._replica
        buffers = replica.model.buffers()
        if buffers and not replica.alone:
            replica.meet()
            replica.buffers.broadcast(buffers, replica.ranks)

    # ---- copies: each rank makes and loads them alone --------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the group and the reducer, which cannot leave the process.

        Raises:
            RuntimeError: if the group is not the default one, which is the one a copy will use.
        """
        if self._replica.group is not dist.group.WORLD:
            with self._errors_logged():
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
        replica.manual = self._manual_finalization
        replica.start_as_copy()


def _device_of(module: object) -> torch.device:
    params = module.parameters() if isinstance(module, nn.Module) else iter(())
    return next((param.device for param in params), torch.device("cpu"))
