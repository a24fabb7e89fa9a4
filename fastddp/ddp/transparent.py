"""The wrapper that looks like the model inside it.

It *shares* the model's dictionaries of parameters, buffers and submodules instead of holding the
model as a submodule. Names in checkpoints, ``named_parameters`` and a surrounding module's
``state_dict`` are therefore the model's own, with nothing to translate. All other attributes and
methods are the model's too; only running it and synchronising it are the wrapper's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.join import Joinable

from fastddp.comm.launch import ensure_process_group
from fastddp.ddp.checkpoint_names import tell_checkpoint_api
from fastddp.ddp.replica import Replica
from fastddp.ddp.wrapper import DistributedDataParallel

_PREFIX = "module."
_SHARED = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    # Hooks on checkpoints. The model makes and loads checkpoints, also if the hooks were registered
    # with the wrapper.
    *("_state_dict_pre_hooks", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_CONVERSIONS = ("to", "to_empty", "cpu", "cuda", "type", "float", "double", "half", "bfloat16")


def _delegated(name: str) -> Callable[..., Any]:
    """Returns a method that calls the model's; where that returns the model, the wrapper."""

    def method(self: TransparentDataParallel, *args: Any, **kwargs: Any) -> Any:
        tell_checkpoint_api()
        if name in _CONVERSIONS:
            self._replica.refuse_in_flight(f"{name}()")
        result = getattr(self.module, name)(*args, **kwargs)
        if name in _CONVERSIONS:
            self._replica.refresh()
        return self if result is self.module else result

    method.__name__ = name
    return method


class TransparentDataParallel(DistributedDataParallel):
    """What :func:`fastddp.wrap` returns: synchronised, and otherwise the model itself.

    ``.module`` is the model. Without a process group, or a launcher to make one from, the world is
    this process and nothing is synchronised.
    """

    has_models_names = True
    """Tells :mod:`fastddp.ddp.checkpoint_names` that no ``module.`` precedes the names."""

    def _assemble(self, module: nn.Module, replica: Replica) -> None:
        nn.Module.__init__(self)
        Joinable.__init__(self)
        own = self.__dict__
        del own["training"]  # the model's is the one
        for name in _SHARED:
            own[name] = getattr(module, name)
        for name in _ddp_methods():
            if callable(getattr(module, name, None)):
                own[name] = getattr(module, name)  # a model's own `gather` is not torch's DDP's
        self._init_state()
        own["_replica"] = replica
        own["module"] = module  # not by assignment, which would register a submodule
        replica.attach()

    @staticmethod
    def _find_group(group: ProcessGroup | None, device_mesh: Any = None) -> ProcessGroup | None:
        if group is None and device_mesh is None:
            return ensure_process_group()
        return DistributedDataParallel._find_group(group, device_mesh)

    # ---- attributes ------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        if module is not None:
            try:
                return getattr(module, name)
            except AttributeError:
                pass
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        if (
            "module" not in own
            or name in own
            or isinstance(getattr(type(self), name, None), property)
        ):
            object.__setattr__(self, name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.module)})

    def __repr__(self) -> str:
        return f"fastddp.wrap({self.module!r})"

    # ---- checkpoints -----------------------------------------------------------------------------

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Lists the wrapper in the model's place, and what is in the model."""
        tell_checkpoint_api()
        yield from super().named_modules(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint of the model, or one of torch's class, whose keys begin `module.`."""
        if self._has_prefix(state_dict, _PREFIX):
            state_dict = OrderedDict(state_dict)
            nn.modules.utils.consume_prefix_in_state_dict_if_present(state_dict, _PREFIX)
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Loads the wrapper's part of a surrounding module's checkpoint."""
        if self._has_prefix(state_dict, prefix + _PREFIX):
            for key in list(state_dict):
                state_dict[prefix + key.removeprefix(prefix + _PREFIX)] = state_dict.pop(key)
        self.module._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _has_prefix(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Returns whether this is torch's spelling, and not that of a model with such a child."""
        if not state_dict or "module" in self._modules:
            return False
        return all(key.startswith(prefix) for key in state_dict)

    # ---- copies ----------------------------------------------------------------------------------

    def _convert(self, *args: Any, **kwargs: Any) -> None:
        self.module._apply(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restore(dist.group.WORLD)


class TransparentContainer(TransparentDataParallel):
    """The wrapper of models that have a length and items, such as ``nn.Sequential``."""

    def __len__(self) -> int:
        return len(self.module)

    def __bool__(self) -> bool:
        return True  # an empty container is a model too

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.module[key] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module)

    def __contains__(self, item: Any) -> bool:
        return item in self.module


class _WithExtraState:
    """Methods of models that have state besides tensors.

    Torch's checkpoint API looks in the class for them, so not every wrapper may have them.
    """

    get_extra_state = _delegated("get_extra_state")
    set_extra_state = _delegated("set_extra_state")


class TransparentWithExtraState(_WithExtraState, TransparentDataParallel):
    """The wrapper of models that have state besides tensors."""


class TransparentContainerWithExtraState(_WithExtraState, TransparentContainer):
    """The wrapper of models that have state besides tensors, and items."""


def class_for(model: nn.Module) -> type[TransparentDataParallel]:
    """Returns the class of wrappers that has the special methods of the model's class."""
    has_extra_state = type(model).get_extra_state is not nn.Module.get_extra_state
    if hasattr(type(model), "__getitem__"):
        return TransparentContainerWithExtraState if has_extra_state else TransparentContainer
    return TransparentWithExtraState if has_extra_state else TransparentDataParallel


# Models override these; reading the shared dictionaries alone would miss that.
for _name in (
    *("train", "eval", "apply", "zero_grad", "requires_grad_", "state_dict"),
    *("parameters", "named_parameters", "buffers", "named_buffers", "children", "named_children"),
    *("get_parameter", "get_buffer", "get_submodule"),
    *("register_parameter", "register_buffer", "register_module", "add_module"),
    *_CONVERSIONS,
):
    setattr(TransparentDataParallel, _name, _delegated(_name))


def _ddp_methods() -> set[str]:
    """Lists the public methods that the wrapper has and a plain module has not."""
    return {
        name
        for cls in (DistributedDataParallel, nn.parallel.DistributedDataParallel, Joinable)
        for name, member in vars(cls).items()
        if callable(member) and not name.startswith("_") and not hasattr(nn.Module, name)
    }
