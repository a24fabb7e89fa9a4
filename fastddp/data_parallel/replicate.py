"""Makes replicas of a module that share one set of parameters, within one process.

A replica consists of *shells*, shallow copies of the module and its submodules. In place of the
module's tensors they hold *stand-ins* (:mod:`fastddp.data_parallel.stand_ins`).

Stand-ins are kept from step to step, shells are not. Making a shell takes microseconds, and a new
one has every attribute, hook, mode and submodule that was changed since the last step. So what a
forward assigns to a replica's attributes is lost after the step, and forwards in several threads do
not see each other's.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastddp.data_parallel.packing import fused_copies
from fastddp.data_parallel.stand_ins import StandIns


class Replicator:
    """Makes a module's replicas, and keeps the stand-ins for the next step.

    A copy or a pickle of it keeps nothing. Several threads may use it at once.
    """

    def __init__(self) -> None:
        self._kept: StandIns | None = None

    def __reduce__(self) -> tuple[type[Replicator], tuple[()]]:
        return Replicator, ()

    def replicate(self, module: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
        """Makes one replica per device.

        The first replica has the module's own buffers, so that its writes to them stay. The others
        have copies of the buffers, new ones at each call.

        Args:
            module: the module to replicate, with its parameters and buffers on the first device.
            devices: the devices, one per replica; one device may appear several times.

        Returns:
            The replicas, in the order of the devices.

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

    def _stand_ins(self, params: Sequence[Tensor], devices: Sequence[torch.device]) -> StandIns:
        kept = self._kept  # read once: another thread may replace it
        if kept is None or not kept.serve(params, devices):
            self._kept = kept = None  # the old copies' memory is freed before new ones are made
            kept = StandIns.of(params, devices)
            if all(param.is_leaf for param in params):  # keeping others would keep their graph
                self._kept = kept
        return kept

    def forget(self) -> None:
        """Drops all stand-ins, so that the next call copies every parameter again."""
        self._kept = None


def _differentiable(module: nn.Module) -> list[Tensor]:
    """Lists the parameters, tied ones once, and the buffers that require a gradient."""
    return [*module.parameters(), *(b for b in module.buffers() if b.requires_grad)]


def _shell(module: nn.Module) -> nn.Module:
    """Returns a shallow copy of a module, as :class:`torch.nn.DataParallel` makes it.

    Raises:
        NotImplementedError: if the module is compiled.
        RuntimeError: if the module is lazy and not initialised yet.
    """
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
    # What `_replicate_for_data_parallel` does, without nn.Module's slow assignment of attributes.
    shell = kind.__new__(kind)
    object.__setattr__(shell, "__dict__", {**module.__dict__, "_is_replica": True})
    return shell


def _is_plain(kind: type[nn.Module]) -> bool:
    """Returns whether modules of this type take attributes as :class:`torch.nn.Module` does."""
    return kind.__setattr__ is nn.Module.__setattr__


def _fill(
    shell: nn.Module,
    module: nn.Module,
    shells: Mapping[nn.Module, nn.Module],
    stand_in: Mapping[int, Tensor],
) -> None:
    """Gives a shell the submodules and tensors of its replica.

    Args:
        shell: the shallow copy to fill.
        module: the module that the shell is a copy of.
        shells: the replica's shell for each module.
        stand_in: the replica's tensor for each tensor of the module, by the tensor's ``id``.
    """
    children = {k: None if m is None else shells[m] for k, m in module._modules.items()}
    buffers = {k: None if b is None else stand_in[id(b)] for k, b in module._buffers.items()}
    params = {k: None if p is None else stand_in[id(p)] for k, p in module._parameters.items()}
    own = shell.__dict__
    if not _is_plain(type(module)):
        # RNNs and script modules keep references to their tensors elsewhere, and update these when
        # an attribute is assigned.
        for name, value in (*children.items(), *buffers.items(), *params.items()):
            if value is not None:
                setattr(shell, name, value)
    if not isinstance(module, torch.jit.ScriptModule):
        # In these dicts `parameters()` finds them. Torch's class assigns plain attributes, so that
        # its replicas have no parameters.
        own.update(_modules=children, _buffers=buffers, _parameters=params)
    forward = own.get("forward")  # a forward assigned to the instance is still bound to the module
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        own["forward"] = types.MethodType(forward.__func__, shell)
