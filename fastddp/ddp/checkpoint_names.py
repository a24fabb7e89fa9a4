"""Torch's checkpoint API, told which wrappers put `module.` before their model's names.

``torch.distributed.checkpoint.state_dict`` follows names through a model and takes every instance
of torch's DistributedDataParallel for one more step, `module`. What :func:`fastddp.wrap` returns is
an instance whose names are the model's own. The API tells by an `isinstance` with the class that
its module calls ``DDP``, and asks the object nothing before; so that one name is bound to the class
of those that have the prefix. Everybody else's `isinstance` is left alone.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from typing import Any

from torch.nn.parallel import DistributedDataParallel as TorchDDP

_API = "torch.distributed.checkpoint.state_dict"


class _OfPrefixed(ABCMeta):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, TorchDDP) and not getattr(instance, "has_models_names", False)


class _PrefixedDDP(TorchDDP, metaclass=_OfPrefixed):
    """Torch's class and its subclasses, but for those whose names are the model's."""


def tell_checkpoint_api() -> None:
    """Binds the name, if that module is imported; importing it takes half a second.

    To be called whenever a wrapper is asked for names, which the API does before it follows any.
    """
    api = sys.modules.get(_API)
    if api is not None and getattr(api, "DDP", None) is TorchDDP:
        api.DDP = _PrefixedDDP  # type: ignore[attr-defined]
