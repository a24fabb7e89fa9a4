"""When gradients arrive in a backward, by parameter: measured from the first question on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import nn
from torch.autograd.graph import get_gradient_edge

from fastddp.device.compiler import untraced


class Arrivals:
    """The times at which gradients arrive. Hooks the parameters for as long as it lives.

    Args:
        params: parameters that require a gradient.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self._arrived_ns = dict.fromkeys(params, 0)
        self._handles = [
            get_gradient_edge(param).node.register_hook(_hook(self._arrived_ns, param))
            for param in self._arrived_ns
        ]

    def __del__(self) -> None:
        for handle in self._handles:
            handle.remove()

    def are_of(self, params: Iterable[nn.Parameter]) -> bool:
        """Returns whether these are the parameters that are hooked, in this order."""
        return list(map(id, self._arrived_ns)) == list(map(id, params))

    def since(self, began_ns: int) -> list[int]:
        """Returns, by parameter, how many nanoseconds into a backward the gradient arrived.

        0 for a parameter that has got no gradient since.

        Args:
            began_ns: the beginning of the latest backward, in nanoseconds since the epoch.
        """
        return [max(0, arrived - began_ns) for arrived in self._arrived_ns.values()]


def _hook(arrived_ns: dict[nn.Parameter, int], param: nn.Parameter) -> Callable[..., None]:
    @untraced
    def hook(*_: object) -> None:
        arrived_ns[param] = time.time_ns()

    return hook
