"""Whether a model still has the parameters that it was wrapped with, by name.

Torch calls a hook whenever a parameter or a submodule is registered, anywhere in the process; those
of a watched model make it *doubtful*, and only then are its parameters looked at. A step in which
nothing is registered costs nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

_MAX_NAMES = 5

_watches: tuple[weakref.ref[ModelWatch], ...] = ()
_registered = False


class ModelWatch:
    """The parameters that a model had when it was looked at last.

    Args:
        module: the model to be watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.look()
        _add(self)

    def look(self) -> None:
        """Takes the model as it is now for the one to compare with."""
        self.is_doubtful = False
        self._modules = {id(module) for module in self._module.modules()}
        self._params = dict(self._module.named_parameters())

    def concerns(self, module: nn.Module) -> bool:
        """Returns whether ``module`` is a part of the model, or was; it may be another's by now."""
        return id(module) in self._modules

    def difference(self) -> str:
        """Returns what has changed since the last look, in words; nothing if nothing has."""
        self.is_doubtful = False
        now, before = dict(self._module.named_parameters()), self._params
        if now.keys() == before.keys() and all(now[name] is before[name] for name in now):
            self._modules = {id(module) for module in self._module.modules()}
            return ""
        return describe(
            {
                "new": [name for name in now if name not in before],
                "gone": [name for name in before if name not in now],
                "replaced": [n for n in now if n in before and now[n] is not before[n]],
            }
        )


def describe(changes: Mapping[str, list[str]]) -> str:
    """Returns in words which parameters have become what; at most a few names of each kind.

    Args:
        changes: names of parameters, by what has become of them, such as "replaced".
    """
    return "; ".join(
        f"{', '.join(repr(name) for name in names[:_MAX_NAMES])}"
        f"{'' if len(names) <= _MAX_NAMES else f' and {len(names) - _MAX_NAMES} more'}"
        f" {'is' if len(names) == 1 else 'are'} {what}"
        for what, names in changes.items()
        if names
    )


def _add(watch: ModelWatch) -> None:
    global _watches, _registered
    if not _registered:
        _registered = True
        register_module_parameter_registration_hook(_on_registration)
        register_module_module_registration_hook(_on_registration)
    # Another tuple, since another thread may be walking through this one.
    _watches = (*(ref for ref in _watches if ref() is not None), weakref.ref(watch))


def _on_registration(module: nn.Module, _: str, __: Any) -> None:
    for ref in _watches:
        watch = ref()
        if watch is not None and watch.concerns(module):
            watch.is_doubtful = True
