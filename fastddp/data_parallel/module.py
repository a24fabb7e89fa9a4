"""`DataParallel`: one process, several devices, or several threads on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastddp.data_parallel.replicate import Replicator
from fastddp.data_parallel.scatter import gather, scatter
from fastddp.data_parallel.workers import Workers


class DataParallel(nn.DataParallel[nn.Module]):
    """Splits a batch over replicas of a module, and adds up the replicas' gradients in the module.

    It takes the arguments of :class:`torch.nn.DataParallel` and behaves the same: inputs are split
    along `dim`, each replica runs on its piece in its own thread, outputs are concatenated, and one
    backward goes through all of it. The differences:

    * Threads stay between steps, and so do the replicas' parameters. A parameter is copied to
      another device again only after it was written to. Writes through ``.data`` or a raw pointer
      are not noticed; call :meth:`forget_replicas` after them.
    * A device may be named several times, also ``"cpu"``. The replicas on one device share the
      parameters' memory and divide the intra-op threads among them. A backward on the CPU runs in
      the calling thread alone. Replicas on one device draw random numbers from one generator, in
      the order in which their threads happen to run.
    * ``parameters()`` of a replica are the replica's own; in torch's class a replica has none.
    * A parameter that no replica used has no gradient; in torch's class its gradient is zero.
    * Inputs that split into different numbers of pieces are an error; torch's class drops the
      pieces that are left over.

    It is a subclass of torch's class, so that tools which unwrap ``.module`` of torch's class do so
    here. Torch's ``__init__`` does not run, because on a machine without a GPU it would discard
    `device_ids`.

    As in torch's class, writes of the first replica into its buffers stay, and those of the others
    are lost, as are attributes that a forward assigns. Hooks of the module and its submodules run
    once per replica. A scalar output becomes a vector with one element per replica.

    It works within one process and communicates with no other: nothing of it is collective.
    Forwards of one instance may run in several threads at once.

    Args:
        module: the module to replicate, with its parameters and buffers on the first device.
        device_ids: the devices, one per replica; an integer stands for a GPU. By default all GPUs.
            On a machine without a GPU the module is then called directly, without replicas.
        output_device: the device on which outputs are gathered, by default the first device.
        dim: the dimension of inputs and outputs along which the batch lies.

    Raises:
        TypeError: if `module` is not a :class:`torch.nn.Module`.
        ValueError: if `device_ids` is empty or names devices of several types, or if the module or
            one of its submodules is wrapped for data parallelism between processes.

    Example::

        model = fastddp.DataParallel(Model(), device_ids=["cpu", "cpu"])
        loss_of(model(inputs), targets).backward()
    """

    device_ids: list[torch.device]  # type: ignore[assignment]  # torch: integers
    output_device: torch.device  # type: ignore[assignment]

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | str | torch.device] | None = None,
        output_device: int | str | torch.device | None = None,
        dim: int = 0,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"fastddp.DataParallel: expected a torch.nn.Module, got {type(module).__name__}"
            )
        nn.Module.__init__(self)
        devices = _all_gpus() if device_ids is None else [_device(d) for d in device_ids]
        if device_ids is not None and not devices:
            raise ValueError(
                "fastddp.DataParallel: device_ids is empty; name a device for each replica, such"
                ' as ["cpu", "cpu"], or leave it out for all GPUs'
            )
        if len({device.type for device in devices}) > 1:
            raise ValueError(
                "fastddp.DataParallel: device_ids names devices of several types,"
                f" {', '.join(map(str, devices))}; use one type"
            )
        if len(devices) > 1:
            _refuse_wrapped(module)
        self.dim = dim
        self.module = module
        self.device_ids = devices
        self._workers = Workers()
        self._replicator = Replicator()
        if not devices:
            return
        self.src_device_obj = devices[0]
        self.output_device = devices[0] if output_device is None else _device(output_device)
        if len(devices) == 1:
            module.to(devices[0])

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the replicas on their pieces of the batch and returns the gathered outputs.

        Args:
            *inputs: the arguments of the module's forward. Every tensor in them, at any depth of
                lists, tuples, mappings and dataclasses, is split along the batch dimension. All
                else goes to every replica as it is.
            **kwargs: the keyword arguments of the module's forward, which are split the same way.

        Returns:
            The module's output for the whole batch, on the output device. Tensors are concatenated
            along the batch dimension; scalars become a vector with one element per replica.

        Raises:
            RuntimeError: if the module is not on the first device, or if a forward wrote to a
                parameter while other replicas shared its memory.
            ValueError: if inputs cannot be split, or outputs do not have the same structure.
            TypeError: if replicas return different values that are not tensors.
            NotImplementedError: if a submodule is compiled.
        """
        if not self.device_ids:
            return self.module(*inputs, **kwargs)
        self._check_place()
        pieces, piece_kwargs = self.scatter(inputs, kwargs, self.device_ids)
        if len(self.device_ids) == 1:
            return self.module(*pieces[0], **piece_kwargs[0])
        devices = self.device_ids[: len(pieces)]
        replicas = self.replicate(self.module, devices)
        shared = self._shared(devices)
        outputs = self.parallel_apply(replicas, pieces, piece_kwargs)
        self._check_unwritten(shared)
        return self.gather(outputs, self.output_device)

    # ---- the four parts, under torch's names, so that a subclass can replace one -----------------

    def scatter(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, device_ids: Sequence[Any]
    ) -> Any:
        """Splits the arguments of forward into one piece per replica.

        Without arguments there is one piece. With arguments but without a tensor in them, each
        device gets the same arguments.

        Args:
            inputs: the arguments, as :meth:`forward` takes them.
            kwargs: the keyword arguments, as :meth:`forward` takes them.
            device_ids: the devices that the pieces go to.

        Returns:
            Two lists of equal length, with a tuple of arguments and a dict of keyword arguments for
            each replica. There may be fewer of them than devices.

        Raises:
            ValueError: if a tensor cannot be split along the batch dimension, or tensors split into
                different numbers of pieces.
        """
        if not inputs and not kwargs:
            return [()], [{}]
        pieces = scatter((inputs, kwargs or {}), [_device(d) for d in device_ids], self.dim)
        return [args for args, _ in pieces], [named for _, named in pieces]

    def replicate(self, module: nn.Module, device_ids: Sequence[Any]) -> list[nn.Module]:
        """Makes the replicas of a module.

        Args:
            module: the module to replicate, on the first of the devices.
            device_ids: the devices, one per replica.

        Returns:
            One replica per device, in the order of the devices.

        Raises:
            NotImplementedError: if a submodule is compiled.
            RuntimeError: if a submodule is lazy and not initialised yet.
        """
        return self._replicator.replicate(module, [_device(d) for d in device_ids])

    def parallel_apply(
        self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any
    ) -> list[Any]:
        """Calls each replica in its thread, in the caller's grad, inference and autocast modes.

        Args:
            replicas: the replicas, one per device.
            inputs: a tuple of arguments for each replica.
            kwargs: a dict of keyword arguments for each replica.

        Returns:
            The outputs of the replicas, in their order.

        Raises:
            BaseException: the exception of the first replica that failed. The message begins with
                the number of the replica and its device.
        """
        devices = self.device_ids[: len(replicas)]
        run = functools.partial(_run, modes=_modes(self.device_ids[0].type))
        tasks = [
            functools.partial(run, *arguments, _current_stream(device))
            for *arguments, device in zip(replicas, inputs, kwargs, devices, strict=True)
        ]
        places = [f"in replica {i} on device {device}" for i, device in enumerate(devices)]
        return self._workers.run(tasks, places)

    def gather(self, outputs: Any, output_device: Any) -> Any:
        """Puts the replicas' outputs together.

        Args:
            outputs: the outputs of the replicas, in their order, all of the same structure.
            output_device: the device that the result is on.

        Returns:
            One output of that structure, as :meth:`forward` returns it.

        Raises:
            ValueError: if the outputs do not have the same structure.
            TypeError: if replicas return different values that are not tensors.
        """
        return gather(outputs, _device(output_device), self.dim)

    # ---- upkeep ----------------------------------------------------------------------------------

    def forget_replicas(self) -> None:
        """Makes the next forward copy all parameters to the other devices, changed or not."""
        self._replicator.forget()

    def _check_place(self) -> None:
        source = self.src_device_obj
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.device != source:
                raise RuntimeError(
                    "module must have its parameters and buffers on device"
                    f" {source} (device_ids[0]) but found one of them on device: {tensor.device}"
                )

    def _shared(self, devices: Sequence[torch.device]) -> list[tuple[str, nn.Parameter, int]]:
        """Lists the parameters that several replicas share, each with its name and version."""
        if devices.count(devices[0]) < 2:
            return []
        named = self.module.named_parameters()
        return [(name, param, param._version) for name, param in named if not param.is_inference()]

    def _check_unwritten(self, shared: Sequence[tuple[str, nn.Parameter, int]]) -> None:
        """Refuses a forward that wrote to parameters while other replicas were reading them.

        Args:
            shared: the parameters that replicas share, with the versions from before the forward.

        Raises:
            RuntimeError: if the version of a parameter has changed.
        """
        for name, param, version in shared:
            if param._version != version:
                raise RuntimeError(
                    f"fastddp.DataParallel: the forward wrote to the parameter {name}, whose memory"
                    f" the replicas on {self.src_device_obj} share; use different devices, or write"
                    " outside of forward (for nn.Embedding: not max_norm)"
                )


def _refuse_wrapped(module: nn.Module) -> None:
    """Refuses a module that averages gradients between processes.

    Each of its replicas would average for itself, and the processes would wait for each other.

    Raises:
        ValueError: if the module or one of its submodules is such a wrapper.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.parallel.DistributedDataParallel):
            place = f"its submodule '{name}'" if name else "the module"
            raise ValueError(
                f"fastddp.DataParallel: {place} is wrapped for several processes already"
                f" ({type(child).__name__}); give the replicas its .module, or have one process per"
                " device and leave DataParallel out"
            )


def _run(
    module: nn.Module,
    inputs: Any,
    kwargs: dict[str, Any],
    stream: torch.Stream | None,
    *,
    modes: Sequence[Callable[[], Any]],
) -> Any:
    with ExitStack() as stack:
        if stream is not None:
            stack.enter_context(torch.accelerator.device_index(stream.device.index))
            stack.enter_context(stream)
        for mode in modes:
            stack.enter_context(mode())
        return module(*inputs, **kwargs)


def _modes(device_type: str) -> list[Callable[[], Any]]:
    """Returns functions that make context managers for the modes that this thread is in.

    Entered in another thread, they bring that thread into the same modes.

    Args:
        device_type: the type of the replicas' devices, such as ``"cuda"``.
    """
    modes: list[Callable[[], Any]] = [
        functools.partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    for kind in dict.fromkeys(("cpu", device_type)):
        if torch.is_autocast_enabled(kind):
            dtype, cache = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
            modes.append(functools.partial(torch.autocast, kind, dtype, True, cache))
    return modes


def _device(device: int | str | torch.device) -> torch.device:
    """Returns a device with its index, so that equal ones compare equal."""
    device = torch.device(device)
    if device.type != "cpu" and device.index is None:
        return torch.device(device.type, torch.accelerator.current_device_index())
    return torch.device("cpu") if device.type == "cpu" else device


def _all_gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _current_stream(device: torch.device) -> torch.Stream | None:
    """Returns the stream of the calling thread; None on the CPU.

    A replica's thread has to run on it. By default a thread uses the device's default stream, which
    is not ordered with the caller's stream.
    """
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)
