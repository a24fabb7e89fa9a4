"""Replicas of a module that share one set of parameters, within one process.

A replica has *shells*, shallow copies of the module and its submodules, and in them *stand-ins*
for the tensors. A stand-in for a parameter has the parameter's memory on the parameter's own
device and a copy's on another one; its gradient goes to the parameter through a :class:`_Fan`.

Stand-ins are kept from step to step. Shells are not: making one takes microseconds, and a fresh one
has every attribute, hook, mode and submodule that was changed in the meantime. What a forward
assigns to a replica's attributes is lost with it, and forwards in several threads do not meet.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Replicator:
    """Makes a module's replicas. A copy, or a pickle, starts with nothing kept."""

    def __init__(self) -> None:
        self._kept: _StandIns | None = None

    def __reduce__(self) -> tuple[type[Replicator], tuple[()]]:
        return Replicator, ()

    def replicate(self, module: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
        """Returns one replica per device; the module's tensors are on the first one.

        The first replica has the module's own buffers, so that what it writes into them stays. The
        others have copies, made anew for each call.

        Raises:
            NotImplementedError: if a submodule is compiled.
            RuntimeError: if a submodule is lazy and not initialised yet.
        """
        modules = list(module.modules())
        shells = [{m: _shell(m) for m in modules} for _ in devices]
        params = _differentiable(module)
        buffers = [b for b in module.buffers() if not b.requires_grad]
        kept = self._stand_ins(params, devices)
        replicas = []
        for index, device in enumerate(devices):
            copies = fused_copies(buffers, device) if index else buffers
            stand_in = {id(b): copy for b, copy in zip(buffers, copies, strict=True)}
            stand_in |= {id(p): t for p, t in zip(params, kept.tensors[index], strict=True)}
            for m, shell in shells[index].items():
                _fill(shell, m, shells[index], stand_in)
            replicas.append(shells[index][module])
        return replicas

    def _stand_ins(self, params: Sequence[Tensor], devices: Sequence[torch.device]) -> _StandIns:
        kept = self._kept  # read once: another thread may replace it
        if kept is None or not kept.serve(params, devices):
            self._kept = kept = None  # a copy's memory is free before the next one is made
            kept = _StandIns.of(params, devices)
            if all(param.is_leaf for param in params):  # else a caller's graph would stay alive
                self._kept = kept
        return kept

    def forget(self) -> None:
        """Lets go of everything kept, so that the next call copies every parameter again."""
        self._kept = None


def _differentiable(module: nn.Module) -> list[Tensor]:
    """Lists the parameters, tied ones once, and whatever buffers take a gradient."""
    return [*module.parameters(), *(b for b in module.buffers() if b.requires_grad)]


# ---- tensors -------------------------------------------------------------------------------------


class _StandIns(NamedTuple):
    """For each device one tensor for each parameter. Never changed, only replaced."""

    params: tuple[Tensor, ...]  # held, so that no other tensor can have the same id
    keys: list[object]
    devices: tuple[torch.device, ...]
    nodes: list[object]  # of the graph, one for each parameter; None without a gradient
    tensors: list[list[Tensor]]

    @classmethod
    def of(cls, params: Sequence[Tensor], devices: Sequence[torch.device]) -> _StandIns:
        keys = _keys(params, devices)
        # A step without gradients may be the first; its stand-ins serve the later ones too.
        with torch.inference_mode(False), torch.enable_grad():
            shared = [None] * len(params)
            copies = [
                shared if device == devices[0] else fused_copies(params, device)
                for device in devices
            ]
            by_param = [
                _Fan.apply(param, own)  # type: ignore[no-untyped-call]
                for param, own in zip(params, zip(*copies, strict=True), strict=True)
            ]
        tensors = [[fan[index] for fan in by_param] for index in range(len(devices))]
        nodes: list[object] = [fan[0].grad_fn for fan in by_param]
        return cls(tuple(params), keys, tuple(devices), nodes, tensors)

    def serve(self, params: Sequence[Tensor], devices: Sequence[torch.device]) -> bool:
        """Returns whether these are up to date, for at least these devices."""
        return (
            self.devices[: len(devices)] == tuple(devices)
            and self.keys == _keys(params, self.devices)
            and self._untouched()
        )

    def _untouched(self) -> bool:
        """Returns whether no forward wrote to these.

        A write under autograd has put that step's graph between them and the parameter, and one to
        a copy is to be lost.
        """
        return all(
            tensor.grad_fn is node and (device == self.devices[0] or tensor._version == 0)
            for device, tensors in zip(self.devices, self.tensors, strict=True)
            for tensor, node in zip(tensors, self.nodes, strict=True)
        )


def _keys(params: Sequence[Tensor], devices: Sequence[torch.device]) -> list[object]:
    """Describes what stand-ins depend on.

    With shared memory that is where a parameter lies, and with copies also its version, which
    every write through the tensor raises and a write through its `.data` does not.
    """
    if all(device == devices[0] for device in devices):
        return [_place(param) for param in params]
    return [(*_place(param), _version(param)) for param in params]


def _place(param: Tensor) -> tuple[object, ...]:
    place = (param.data_ptr(), param.shape, param.stride(), param.dtype)
    return (id(param), param.requires_grad, *place)


def _version(param: Tensor) -> object:
    return object() if param.is_inference() else param._version  # an object equals only itself


class _Fan(torch.autograd.Function):
    """One parameter in, one stand-in per replica out; the gradients are added in their order.

    Not in the order of arrival, which threads would decide, and which the sum's bits show.
    """

    @staticmethod
    def forward(ctx: Any, param: Tensor, copies: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        # A replica that did not use it adds nothing, where a zero would make a sparse sum dense.
        ctx.set_materialize_grads(False)
        ctx.device = param.device
        # Detached, not views: a view's place in the graph is lost when its base is written to,
        # as the optimizer does. The version counter is shared, so that autograd still sees it.
        return tuple((param if copy is None else copy).detach() for copy in copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        total = None
        for grad in grads:
            if grad is not None:
                moved = grad.to(ctx.device, non_blocking=True)
                total = moved if total is None else total + moved
        return total, None


@torch.no_grad()
def fused_copies(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies tensors to a device, in one transfer for each dtype.

    The memory is fresh: a graph that still refers to an earlier copy goes on being right.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    copies = list(tensors)
    for index, tensor in enumerate(tensors):
        if tensor.layout is torch.strided and not tensor.is_quantized:
            by_dtype.setdefault(tensor.dtype, []).append(index)
        else:  # no plain memory to lay side by side
            copies[index] = tensor.to(device, copy=True)
    for indices in by_dtype.values():
        flat = torch.cat([tensors[index].reshape(-1) for index in indices])
        pieces = flat.to(device, non_blocking=True).split([tensors[i].numel() for i in indices])
        for index, piece in zip(indices, pieces, strict=True):
            # `.data` has its own version counter. Else a write to one buffer would look to autograd
            # like a write to all of them.
            copies[index] = piece.view(tensors[index].shape).data
    return copies


# ---- modules -------------------------------------------------------------------------------------


def _shell(module: nn.Module) -> nn.Module:
    """Returns a shallow copy, as torch's class makes it."""
    if module.__dict__.get("_compiled_call_impl") or "_orig_mod" in module._modules:
        raise NotImplementedError(
            f"fastddp.DataParallel: {type(module).__name__} is compiled, and compiled code cannot"
            " be given to a replica; wrap the module before compile()"
        )
    kind = type(module)
    if not (
        _is_plain(kind)
        and kind._replicate_for_data_parallel is nn.Module._replicate_for_data_parallel
    ):
        special: nn.Module = module._replicate_for_data_parallel()
        return special
    shell = kind.__new__(kind)  # the same, without nn.Module's slow assignment
    object.__setattr__(shell, "__dict__", {**module.__dict__, "_is_replica": True})
    return shell


def _is_plain(kind: type[nn.Module]) -> bool:
    """Returns whether assigning to a module of this type does nothing but that."""
    return kind.__setattr__ is nn.Module.__setattr__


def _fill(
    shell: nn.Module,
    module: nn.Module,
    shells: Mapping[nn.Module, nn.Module],
    stand_in: Mapping[int, Tensor],
) -> None:
    """Gives a shell its replica's submodules and tensors."""
    children = {k: None if m is None else shells[m] for k, m in module._modules.items()}
    buffers = {k: None if b is None else stand_in[id(b)] for k, b in module._buffers.items()}
    params = {k: None if p is None else stand_in[id(p)] for k, p in module._parameters.items()}
    own = shell.__dict__
    if not _is_plain(type(module)):
        # RNNs and script modules want to be told: they keep references elsewhere.
        for name, value in (*children.items(), *buffers.items(), *params.items()):
            if value is not None:
                setattr(shell, name, value)
    if not isinstance(module, torch.jit.ScriptModule):
        # Not as plain attributes, as torch's class has them: `parameters()` sees these.
        own.update(_modules=children, _buffers=buffers, _parameters=params)
    forward = own.get("forward")  # one that was assigned is still bound to the module
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        own["forward"] = types.MethodType(forward.__func__, shell)
