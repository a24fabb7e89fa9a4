"""Replicas of a module that share one set of parameters, within one process.

A replica has *shells*, shallow copies of the module and its submodules, and in them *stand-ins*
for the tensors. A stand-in for a parameter has the parameter's memory on the parameter's own
device and a copy's on another one; its gradient goes to the parameter through a :class:`_Fan`.
With copies, a fan serves a bucket of parameters, so that gradients come from each device together.

Stand-ins are kept from step to step. Shells are not: making one takes microseconds, and a fresh one
has every attribute, hook, mode and submodule that was changed in the meantime. What a forward
assigns to a replica's attributes is lost with it, and forwards in several threads do not meet.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from fastddp.data_parallel.packing import Layout, Packing
from fastddp.device.flat import DTYPES
from fastddp.engine.plan import MiB, ParamSpec, plan_buckets

_BUCKET_BYTES = 25 * MiB


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
        copies = [buffers, *fused_copies(buffers, devices[1:])]
        replicas = []
        for index in range(len(devices)):
            stand_in = {id(b): copy for b, copy in zip(buffers, copies[index], strict=True)}
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
        keys, copied = _keys(params, devices), _copied(devices)
        tensors = [list(params) for _ in devices]
        # A step without gradients may be the first; its stand-ins serve the later ones too.
        with torch.inference_mode(False), torch.enable_grad():
            others = [index for index, is_copied in enumerate(copied) if is_copied]
            copies = fused_copies(params, [devices[index] for index in others])
            for index, copy in zip(others, copies, strict=True):
                tensors[index] = copy
            for bucket in _buckets(params, any(copied)):
                own = [[row[index] for index in bucket] for row in tensors]
                fan = _Fan.apply(own, *own[0])  # type: ignore[no-untyped-call]
                for nth, index in enumerate(bucket):
                    for row, stand_in in zip(tensors, fan[nth :: len(bucket)], strict=True):
                        row[index] = stand_in
        nodes: list[object] = [stand_in.grad_fn for stand_in in tensors[0]]
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
            tensor.grad_fn is node and not (is_copied and tensor._version)
            for is_copied, tensors in zip(_copied(self.devices), self.tensors, strict=True)
            for tensor, node in zip(tensors, self.nodes, strict=True)
        )


def _copied(devices: Sequence[torch.device]) -> list[bool]:
    """Returns which replicas have copies of the parameters and not the parameters' own memory."""
    return [device != devices[0] for device in devices]


def _keys(params: Sequence[Tensor], devices: Sequence[torch.device]) -> list[object]:
    """Describes what stand-ins depend on.

    With shared memory that is where a parameter lies, and with copies also its version, which
    every write through the tensor raises and a write through its `.data` does not.
    """
    if not any(_copied(devices)):
        return [_place(param) for param in params]
    return [(*_place(param), _version(param)) for param in params]


def _place(param: Tensor) -> tuple[object, ...]:
    place = (param.data_ptr(), param.shape, param.stride(), param.dtype)
    return (id(param), param.requires_grad, *place)


def _version(param: Tensor) -> object:
    return object() if param.is_inference() else param._version  # an object equals only itself


def _buckets(params: Sequence[Tensor], copied: bool) -> list[list[int]]:
    """Returns which parameters share a fan, by their indices.

    A fan runs when the last gradient of its parameters is there, and only then do hooks of the
    first see theirs. So where there is no copy, and nothing to be gained, each has its own.
    """
    together = [
        index
        for index, param in enumerate(params)
        if copied and param.requires_grad and _has_plain_memory(param) and param.dtype in DTYPES
    ]
    alone = sorted(set(range(len(params))) - set(together))
    specs = [ParamSpec.of(params[index]) for index in together]
    # Gradients come roughly in the reverse order of the parameters.
    plan = plan_buckets(specs, list(reversed(range(len(specs)))), [_BUCKET_BYTES])
    buckets = [[together[slot.param] for slot in bucket.slots] for bucket in plan.buckets]
    return [*buckets, *([index] for index in alone)]


def _has_plain_memory(tensor: Tensor) -> bool:
    """Returns whether it is plain memory: not sparse, quantized, or made of other tensors."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


class _Fan(torch.autograd.Function):
    """Parameters in, one stand-in per replica of each out; gradients are added in replica order.

    Not in the order of arrival, which threads would decide, and which the sum's bits show.
    """

    @staticmethod
    def forward(ctx: Any, rows: Sequence[Sequence[Tensor]], *params: Tensor) -> tuple[Tensor, ...]:
        """Takes for each replica what its stand-ins are to have the memory of.

        All of `params` have one dtype and device, and require grad or are one.
        """
        # A replica that did not use it adds nothing, where a zero would make a sparse sum dense.
        ctx.set_materialize_grads(False)
        ctx.device = params[0].device
        ctx.layouts = [Layout.of(param) for param in params] if len(params) > 1 else [None]
        # Detached, not views: a view's place in the graph is lost when its base is written to,
        # as the optimizer does. The version counter is shared, so that autograd still sees it.
        return tuple(tensor.detach() for row in rows for tensor in row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.layouts)
        groups: dict[tuple[int, ...], list[int]] = {}  # by the replicas that used the parameters
        totals: list[Tensor | None] = []
        for index in range(count):
            own = grads[index::count]
            users = tuple([nth for nth, grad in enumerate(own) if grad is not None])
            if count > 1 and users not in ((), (0,)) and _can_pack([own[nth] for nth in users]):
                groups.setdefault(users, []).append(index)
                totals.append(None)
            else:
                totals.append(_sum(own, ctx.device))
        for users, indices in groups.items():
            layouts = [ctx.layouts[index] for index in indices]
            rows = [[grads[nth * count + index] for index in indices] for nth in users]
            for index, total in zip(indices, _packed_sums(layouts, rows, ctx.device), strict=True):
                totals[index] = total
        return None, *totals


def _can_pack(grads: Sequence[Tensor | None]) -> bool:
    """Returns whether gradients are plain memory, and nothing records what is done to them."""
    return not torch.is_grad_enabled() and all(
        grad is not None and _has_plain_memory(grad) and not _is_batched(grad) for grad in grads
    )


def _is_batched(grad: Tensor) -> bool:
    """Returns whether it stands for many, as in ``autograd.grad(..., is_grads_batched=True)``."""
    return is_functorch_wrapped_tensor(grad) or is_legacy_batchedtensor(grad)


def _sum(grads: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Adds one parameter's gradients, those that there are, on a device."""
    total = None
    for grad in grads:
        if grad is not None:
            with _behind(device, [grad]):
                moved = grad.to(device, non_blocking=True)
            total = moved if total is None else total + moved
    return total


def _packed_sums(
    layouts: Sequence[Layout], rows: Sequence[Sequence[Any]], device: torch.device
) -> list[Tensor]:
    """Adds several parameters' gradients, of which each row is on one device, to the same bits.

    Each row is one transfer.
    """
    packing = Packing.of(layouts, rows[0][0].dtype)
    total = None
    for grads in rows:
        with _behind(device, grads):
            flat = packing.pack(grads)
        moved = flat.to(device, non_blocking=True)
        total = moved if total is None else total.add_(moved)
    assert total is not None
    return packing.unpack(total)


@contextmanager
def _behind(device: torch.device, grads: Sequence[Tensor]) -> Iterator[None]:
    """Makes the gradients' device current, on a stream that finds them ready.

    Autograd sees to that for the stream that the fan runs on, on the parameters' device, alone.
    """
    there = grads[0].device
    if there == device:
        yield
        return
    with torch.accelerator.device_index(there.index):
        stream = torch.accelerator.current_stream(there)
        stream.wait_stream(torch.accelerator.current_stream(device))
        yield
        for grad in grads:  # may be of another stream, which must not reuse the memory too early
            if not _is_batched(grad):
                for memory in (grad._indices(), grad._values()) if grad.is_sparse else (grad,):
                    memory.record_stream(stream)


@torch.no_grad()
def fused_copies(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[list[Tensor]]:
    """Copies tensors to each of the devices, in one transfer for each dtype and device.

    The memory is fresh: a graph that still refers to an earlier copy goes on being right.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    copies = [list(tensors) for _ in devices]
    for index, tensor in enumerate(tensors):
        if _has_plain_memory(tensor):
            by_dtype.setdefault(tensor.dtype, []).append(index)
        else:  # no plain memory to lay side by side
            for row, device in zip(copies, devices, strict=True):
                row[index] = tensor.to(device, copy=True)
    if not devices:
        return []
    for dtype, indices in by_dtype.items():
        packing = Packing.of([Layout.of(tensors[index]) for index in indices], dtype)
        flat = packing.pack([tensors[index] for index in indices])
        for row, device in zip(copies, devices, strict=True):
            moved = packing.unpack(flat.to(device, non_blocking=True, copy=True))
            for index, copy in zip(indices, moved, strict=True):
                row[index] = copy
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
