"""What is being trained: a module's parameters and buffers, as data parallelism sees them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from fastddp.comm.labels import owner_of_copy
from fastddp.engine.interface import Subject


class Model:
    """A module and the names in it that data parallelism goes by.

    Args:
        module: the module that the script has wrapped.
        delayed: names of the parameters whose gradients are averaged apart from the others.
    """

    def __init__(self, module: nn.Module, delayed: Collection[str]) -> None:
        self.module = module
        self.delayed = frozenset(delayed)
        self.owner = owner_of_copy(module)
        """How the ranks call this model in collectives and messages."""
        self._hooked: dict[nn.Parameter, tuple[torch.dtype, torch.device]] = {}

    @property
    def device(self) -> torch.device:
        """The device of the parameters, all of which are on one."""
        return next(self.module.parameters()).device

    @property
    def ignored(self) -> frozenset[str]:
        """Names of the parameters and buffers that the module asks to leave alone."""
        return ignored_names(self.module)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers of now, by name: modules replace theirs by assignment."""
        ignored = self.ignored
        return {name: b for name, b in self.module.named_buffers() if name not in ignored}

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that start with the same values on every rank."""
        ignored = self.ignored
        return [param for name, param in self.module.named_parameters() if name not in ignored]

    def select(self) -> Subject:
        """Returns the parameters to hook now, and remembers them.

        A parameter that was hooked once is hooked for ever. Otherwise two halves of a model that
        train in turns would have the model hooked anew, and planned anew, at each turn.
        """
        elsewhere, sparse = self.ignored | self.delayed, sparse_parameters(self.module)
        named = {name: p for name, p in self.module.named_parameters() if name not in elsewhere}
        hooked = {name: p for name, p in named.items() if p.requires_grad or p in self._hooked}
        frozen = [p for name, p in named.items() if name not in hooked]
        names = sorted(hooked, key=lambda name: hooked[name] in sparse)  # stable: sparse ones last
        params = [hooked[name] for name in names]
        self._hooked = {param: (param.dtype, param.device) for param in params}
        return Subject(
            params,
            names,
            num_sparse=sum(p in sparse for p in params),
            frozen=frozen,
            number=self.owner.number,
            title=self.owner.title,
        )

    @property
    def hooked(self) -> Collection[nn.Parameter]:
        """The parameters that were selected last, in that order."""
        return self._hooked.keys()

    def is_converted(self) -> bool:
        """Returns whether a selected parameter has got another dtype or device since."""
        return any((p.dtype, p.device) != before for p, before in self._hooked.items())


def ignored_names(module: nn.Module) -> frozenset[str]:
    """Returns names of the parameters and buffers that the module asks to leave alone."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def sparse_parameters(module: nn.Module) -> set[torch.Tensor]:
    """Returns the parameters whose gradients will be sparse."""
    return {
        child.weight
        for child in module.modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse
    }
