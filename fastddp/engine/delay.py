"""Which parameters have their gradients averaged apart from the others, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Delay:
    """Which parameters of a module are delayed, by the names it has for them."""

    names: tuple[str, ...]
    trigger: str
    """The parameter that says when: a backward that gives it a gradient averages the others'."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        named_params: Sequence[tuple[str, nn.Parameter]] | None,
        trigger: nn.Parameter | None,
    ) -> Delay | None:
        """Returns what torch's two arguments amount to; None if there are none.

        Raises:
            ValueError: if only one is given, or a parameter is not the module's, or the trigger
                requires no gradient.
        """
        if (named_params is None) != (trigger is None):
            raise ValueError(
                "delay_all_reduce_named_params and param_to_hook_all_reduce need to be set at the"
                " same time."
            )
        if named_params is None or trigger is None or not named_params:
            return None
        known = dict(module.named_parameters(remove_duplicate=False))
        for name, param in named_params:
            if known.get(name) is not param:
                raise ValueError(
                    f"fastddp: delay_all_reduce_named_params: '{name}' is not the name that"
                    f" {type(module).__name__} has for this parameter of shape"
                    f" {tuple(param.shape)}; use pairs from its named_parameters()"
                )
        canonical = {param: name for name, param in module.named_parameters()}
        if trigger not in canonical or not trigger.requires_grad:
            raise ValueError(
                "fastddp: param_to_hook_all_reduce must be a parameter of"
                f" {type(module).__name__} that requires a gradient, got one of shape"
                f" {tuple(trigger.shape)} that "
                + ("does not" if trigger in canonical else "is none of its parameters")
            )
        names = dict.fromkeys(canonical[param] for _, param in named_params)
        return cls(tuple(names), canonical[trigger])
