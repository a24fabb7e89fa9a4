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
    """Splits a batch over replicas of a module and adds their gradients up in the module.

    Takes the arguments of :class:`torch.nn.DataParallel` and means the same: inputs are split along
    `dim`, each replica runs its piece in its own thread, outputs are concatenated, and one backward
    goes through all of it. What differs:

    * Threads stay between steps, and so do the replicas' parameters. A copy on another device is
      made anew only when its parameter was written to. A write through ``.data`` or a raw pointer
      is not seen; say :meth:`forget_replicas` after it.
    * A device may be named several times, also ``"cpu"``. Its replicas share the parameters' memory
      and divide the intra-op threads among them. In a backward on the CPU, autograd uses the
      calling thread alone. Random numbers on a device named several times come from one generator,
      in whatever order the threads run.
    * A replica's ``parameters()`` are the replica's; in torch's class there are none.
    * A parameter that no replica used has no gradient; in torch's class it is zero.
    * Inputs that split into different numbers of pieces are an error; torch's class drops what has
      no partner.

    It is a subclass, so that tools which unwrap ``.module`` of torch's class do so here, but none
    of torch's ``__init__`` runs, which on a machine without a GPU would throw `device_ids` away.

    As in torch's class, what the first replica writes into buffers in place stays and what the
    others write is lost, as are attributes that a forward assigns; hooks of the module and its
    submodules run once per replica; a scalar output becomes a vector, one element per replica.

    Args:
        module: the module, its parameters and buffers on the first device.
        device_ids: the devices, one per replica; integers are GPUs. By default all GPUs, and
            without one the module is called as it is.
        output_device: where outputs are gathered, by default on the first device.
        dim: the dimension of the batch, in inputs and outputs.

    Raises:
        TypeError: if `module` is no module.
        ValueError: if there are no devices in `device_ids`, or devices of several types; or if the
            module, or one in it, is wrapped for data parallelism between processes.

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

        Raises:
            RuntimeError: if the module is not on the first device, or if a forward wrote to a
                parameter whose memory replicas share.
            ValueError, TypeError: if inputs cannot be split or outputs not be put together.
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

    # ---- the four parts, by torch's names, for subclasses that replace one -----------------------

    def scatter(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, device_ids: Sequence[Any]
    ) -> Any:
        """Returns a tuple of arguments and a dict of keyword arguments for each replica.

        Without any arguments there is one replica; with none that is a tensor there are all.
        """
        if not inputs and not kwargs:
            return [()], [{}]
        pieces = scatter((inputs, kwargs or {}), [_device(d) for d in device_ids], self.dim)
        return [args for args, _ in pieces], [named for _, named in pieces]

    def replicate(self, module: nn.Module, device_ids: Sequence[Any]) -> list[nn.Module]:
        """Returns one replica per device."""
        return self._replicator.replicate(module, [_device(d) for d in device_ids])

    def parallel_apply(
        self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any
    ) -> list[Any]:
        """Calls each replica in its thread, in the caller's grad, inference and autocast modes.

        Raises:
            BaseException: what the first replica that failed raised, with its number and device.
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
        """Returns the replicas' outputs as one."""
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
        """Lists the parameters whose memory several replicas have, with their versions."""
        if devices.count(devices[0]) < 2:
            return []
        named = self.module.named_parameters()
        return [(name, param, param._version) for name, param in named if not param.is_inference()]

    def _check_unwritten(self, shared: Sequence[tuple[str, nn.Parameter, int]]) -> None:
        """Refuses a forward that wrote to parameters, since other replicas were reading them."""
        for name, param, version in shared:
            if param._version != version:
                raise RuntimeError(
                    f"fastddp.DataParallel: the forward wrote to the parameter {name}, whose memory"
                    f" the replicas on {self.src_device_obj} share; use different devices, or write"
                    " outside of forward (for nn.Embedding: not max_norm)"
                )


def _refuse_wrapped(module: nn.Module) -> None:
    """Refuses replicas of what averages gradients between processes: each would do so by itself."""
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
    """Returns what brings another thread into this thread's modes."""
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
    """Returns the caller's stream: a new thread would use the default one, unordered with it."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)
